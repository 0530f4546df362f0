/* A program in C that shares a table with others, and repairs what is lost of it from what it knows itself.
 *
 *     c=$(python -c 'import hwpoison, os; print(os.path.join(hwpoison.__path__[0], "c"))')
 *     cc -std=c11 -O2 -I "$c" -o client examples/client.c "$c/hwpoison.c" -lpthread
 *     HWPOISON_SOCKET=... ./client table        # an object that some process has allocated under this name
 *
 * It fills the table with numbers and sums it; then it waits for losses, and when one is told, sums it in a guard, repairs
 * what is lost, and sums it again. It ends when its standard input does.
 */
#include <errno.h>
#include <hwpoison.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static uint64_t right(uint64_t index) { return index * 2654435761u % 1000003; }

static uint64_t sum(const uint64_t *numbers, uint64_t count) {
    uint64_t total = 0;
    for (uint64_t i = 0; i < count; i++)
        total += numbers[i];
    return total;
}

static void give_up(const char *what) {
    fprintf(stderr, "client: %s: %s\n", what, hwpoison_error());
    exit(1);
}

static void repair(hwpoison_memory *table) {
    hwpoison_range ranges[64];
    int64_t count;
    while ((count = hwpoison_lost(table, ranges, 64)) > 0) {
        for (int64_t i = 0; i < count && i < 64; i++) {
            uint64_t *numbers = malloc(ranges[i].nbytes);
            if (!numbers)
                abort();
            for (uint64_t j = 0; j < ranges[i].nbytes / 8; j++)
                numbers[j] = right(ranges[i].offset / 8 + j);
            int64_t repaired = hwpoison_repair(table, ranges[i].offset, numbers, ranges[i].nbytes);
            if (repaired < 0)
                give_up("what is lost can't be repaired");
            printf("repaired %" PRId64 " bytes\n", repaired);
            free(numbers);
        }
    }
    if (count < 0)
        give_up("what is lost can't be asked");
}

int main(int count, char **arguments) {
    const char *name = count > 1 ? arguments[1] : "table";
    hwpoison_manager *manager = hwpoison_connect(NULL);
    if (!manager)
        give_up("no manager");
    hwpoison_memory *table = hwpoison_attach(manager, name);
    if (!table)
        give_up(name);
    repair(table); /* what was lost before: a store there would be a SIGBUS */
    uint64_t *numbers = hwpoison_address(table), items = hwpoison_nbytes(table) / 8;
    for (uint64_t i = 0; i < items; i++)
        numbers[i] = right(i);
    int notices = hwpoison_notices(manager);
    if (notices < 0)
        give_up("no notices");
    printf("sum %" PRIu64 "\n", sum(numbers, items));
    fflush(stdout);

    for (;;) {
        struct pollfd wait[] = {{notices, POLLIN, 0}, {STDIN_FILENO, POLLIN, 0}};
        if (poll(wait, 2, -1) < 0 && errno != EINTR)
            break;
        hwpoison_notice notice;
        int told;
        while ((told = hwpoison_next_notice(manager, &notice)) == 1) {
            printf("lost %" PRIu64 " bytes at %" PRIu64 " of %s, %s\n", notice.nbytes, notice.offset, notice.name,
                   notice.state);
            const void *view;
            hwpoison_range met;
            hwpoison_guard *guard = hwpoison_guard_open(table, &view);
            if (!guard)
                give_up("no guard");
            uint64_t total = sum(view, items);
            int64_t losses = hwpoison_guard_close(guard, &met, 1);
            if (losses < 0)
                give_up("what was met can't be known");
            if (losses)
                printf("a sum met %" PRIu64 " lost bytes at %" PRIu64 "\n", met.nbytes, met.offset);
            else
                printf("a sum met nothing lost: %" PRIu64 "\n", total);
            repair(table);
            printf("sum %" PRIu64 "\n", sum(numbers, items));
            fflush(stdout);
        }
        if (told < 0)
            give_up("no notices any more");
        char ignored[64];
        if (wait[1].revents && read(STDIN_FILENO, ignored, sizeof ignored) <= 0)
            break;
    }
    hwpoison_close(table);
    hwpoison_disconnect(manager);
    return 0;
}
