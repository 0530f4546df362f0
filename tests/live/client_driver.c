/* What the C client can do beside what examples/client.c shows: each function is one test, by name. */
#define _GNU_SOURCE
#include <errno.h>
#include <hwpoison.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define MUST(what) ((what) ? (void)0 : fail(#what, __LINE__))

static hwpoison_manager *manager;
static hwpoison_memory *table;
static size_t page;

static void fail(const char *what, int line) {
    printf("line %d: not %s: %s\n", line, what, hwpoison_error());
    exit(1);
}

static void say(const char *what) {
    printf("%s\n", what);
    fflush(stdout);
}

static void hear(void) {
    char line[64];
    if (!fgets(line, sizeof line, stdin))
        exit(1);
}

static void memory(void) {
    hwpoison_memory *own = hwpoison_allocate(manager, 10 * page + 100, "own");
    MUST(own && hwpoison_nbytes(own) == 10 * page + 100 && hwpoison_writable(own) && !strcmp(hwpoison_name(own), "own"));
    unsigned char *bytes = hwpoison_address(own);
    MUST(bytes[0] == 0 && bytes[10 * page + 99] == 0);
    memset(bytes, 7, 10 * page + 100);
    hwpoison_memory *again = hwpoison_attach(manager, "own");
    MUST(again && again != own && ((unsigned char *)hwpoison_address(again))[5 * page] == 7);
    hwpoison_close(own);
    MUST(((unsigned char *)hwpoison_address(again))[page] == 7);
    MUST(!hwpoison_allocate(manager, page, "own") && errno == EEXIST);
    MUST(!hwpoison_attach(manager, "nothing") && errno == ENOENT);
    MUST(hwpoison_lost(again, NULL, 0) == 0);
    MUST(hwpoison_repair(again, 1, bytes, page) == -1 && errno == EINVAL);
    MUST(hwpoison_prefetch(again, 0, 10 * page) == 0 && hwpoison_prefetch(again, 0, 20 * page) == -1 && errno == EINVAL);
    hwpoison_close(again);
    MUST(!hwpoison_attach(manager, "own"));
}

/* The other side injects a failure of page 3 between the two. */
static void losses(void) {
    unsigned char *bytes = hwpoison_address(table), *right = malloc(page);
    hwpoison_range ranges[4];
    const void *view, *view_again;
    hwpoison_guard *before = hwpoison_guard_open(table, &view);
    MUST(before && hwpoison_guard_check(before, ranges, 4) == 0);
    say("strike");
    hear();
    MUST(hwpoison_lost(table, ranges, 4) == 1 && ranges[0].offset == 3 * page && ranges[0].nbytes == page);
    /* It was not read yet: nothing was met. */
    MUST(hwpoison_guard_check(before, ranges, 4) == 0);
    MUST(((const volatile unsigned char *)view)[3 * page] == 0);
    hwpoison_guard *inner = hwpoison_guard_open(table, &view_again);
    MUST(inner && view_again == view);
    /* What others have met is not met by this one, and what this one meets is met by both. */
    MUST(hwpoison_guard_check(inner, ranges, 4) == 0);
    MUST(((const volatile unsigned char *)view)[3 * page + 1] == 0);
    MUST(hwpoison_guard_close(inner, ranges, 4) == 1 && ranges[0].offset == 3 * page);
    MUST(hwpoison_guard_check(before, ranges, 4) == 1);
    MUST(hwpoison_guard_check(before, ranges, 4) == 0);
    memset(right, 9, page);
    MUST(hwpoison_repair(table, 3 * page, right, page) == (int64_t)page);
    MUST(((const volatile unsigned char *)view)[3 * page] == 9 && bytes[3 * page] == 9);
    MUST(hwpoison_guard_close(before, ranges, 4) == 0);
    say("strike");
    hear();
    MUST(hwpoison_resident(table, 0, 8 * page, 1) == -1 && errno == HWPOISON_EHWPOISON);
    MUST(hwpoison_discard(table, 0, hwpoison_nbytes(table)) == (int64_t)page && bytes[3 * page] == 0);
    int64_t resident = hwpoison_resident(table, 0, 8 * page, 1);
    int pair[2];
    MUST(resident > 0 && !pipe(pair) && write(pair[1], bytes, 8) == 8 && read(pair[0], bytes + page, 8) == 8);
    MUST(hwpoison_resident_over(table, resident) == 0 && hwpoison_flush(table) == 0);
    say("strike");
    hear();
    say("touch");
    bytes[3 * page] = 1; /* SIGBUS */
}

static void *many(void *argument) {
    for (int i = 0; i < 200; i++) {
        const void *view;
        hwpoison_guard *guard = hwpoison_guard_open(table, &view);
        MUST(guard);
        uint64_t total = 0;
        for (size_t at = 0; at < hwpoison_nbytes(table); at += page)
            total += ((const volatile unsigned char *)view)[at];
        int64_t met = hwpoison_guard_close(guard, NULL, 0);
        MUST(met >= 0 && (met > 0 || total == hwpoison_nbytes(table) / page * 7));
        if (met) {
            void *right = malloc(page);
            hwpoison_range ranges[64];
            memset(right, 7, page);
            int64_t lost = hwpoison_lost(table, ranges, 64);
            for (int64_t one = 0; one < lost && one < 64; one++)
                for (uint64_t at = 0; at < ranges[one].nbytes; at += page)
                    MUST(hwpoison_repair(table, ranges[one].offset + at, right, page) >= 0);
            free(right);
        }
    }
    return argument;
}

/* The other side injects failures, and may kill the manager, all the time. */
static void threads(void) {
    pthread_t all[4];
    memset(hwpoison_address(table), 7, hwpoison_nbytes(table));
    say("begin");
    for (int i = 0; i < 4; i++)
        MUST(!pthread_create(&all[i], NULL, many, NULL));
    for (int i = 0; i < 4; i++)
        pthread_join(all[i], NULL);
}

static void forks(void) {
    volatile unsigned char *bytes = hwpoison_address(table);
    bytes[0] = 7;
    pid_t child = fork();
    if (!child) {
        for (int i = 0; i < 400; i++)
            MUST(mmap(NULL, page << i % 12, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED);
        _exit(bytes[0]); /* SIGSEGV */
    }
    int status;
    MUST(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
    child = fork();
    if (!child) {
        hwpoison_manager *own = hwpoison_connect(NULL);
        hwpoison_memory *same = own ? hwpoison_attach(own, "table") : NULL;
        _exit(same ? ((unsigned char *)hwpoison_address(same))[0] : 1);
    }
    MUST(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 7);
    MUST(bytes[page] == 0);
}

/* The other side kills the manager until it says so: whoever connects finds one. */
static void connects(void) {
    say("begin");
    struct pollfd told = {0, POLLIN, 0};
    while (!poll(&told, 1, 0)) {
        hwpoison_manager *own = hwpoison_connect(NULL);
        MUST(own);
        hwpoison_memory *same = hwpoison_attach(own, "table");
        MUST(same && ((volatile unsigned char *)hwpoison_address(same))[page] == 0);
        hwpoison_disconnect(own);
    }
}

static _Atomic int over;

/* A child has none of the client's channels, whenever it is forked: a channel that it kept open would never say that its
 * manager is dead. */
static void *forking(void *argument) {
    while (!over) {
        pid_t child = fork();
        if (!child) {
            struct stat status;
            for (int fd = 3; fd < 64; fd++)
                if (!fstat(fd, &status) && S_ISSOCK(status.st_mode))
                    _exit(fd);
            _exit(0);
        }
        int status;
        MUST(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    return argument;
}

/* The same, while another thread forks. */
static void forks_beside(void) {
    pthread_t other;
    MUST(!pthread_create(&other, NULL, forking, NULL));
    connects();
    over = 1;
    pthread_join(other, NULL);
}

/* With fewer and fewer descriptors to be had: what can't be opened leaves nothing behind. */
static void descriptors(void) {
    struct rlimit before, few;
    int refused = 0, lowest = dup(0);
    close(lowest);
    MUST(!getrlimit(RLIMIT_NOFILE, &before));
    for (int spare = 6; spare >= 0; spare--) {
        few = before;
        few.rlim_cur = (rlim_t)(lowest + spare);
        MUST(!setrlimit(RLIMIT_NOFILE, &few));
        hwpoison_memory *own = hwpoison_allocate(manager, page, "own");
        MUST(own || errno == EMFILE);
        MUST(!setrlimit(RLIMIT_NOFILE, &before));
        if (own)
            hwpoison_close(own);
        else
            refused++;
        MUST(!hwpoison_attach(manager, "own") && errno == ENOENT);
    }
    MUST(refused && hwpoison_nbytes(table));
}

static void closes(void) {
    say("ready");
    hear();
    hwpoison_close(table);
    say("closed");
}

static void sleeps(void) {
    volatile unsigned char *bytes = hwpoison_address(table);
    say("ready");
    hear();
    bytes[5 * page]++;
    say("not asleep");
}

int main(int count, char **arguments) {
    static const struct {
        const char *name;
        void (*test)(void);
    } tests[] = {{"memory", memory}, {"losses", losses}, {"threads", threads}, {"forks", forks}, {"sleeps", sleeps},
                 {"connects", connects}, {"forks beside", forks_beside}, {"descriptors", descriptors}, {"closes", closes}};
    page = (size_t)sysconf(_SC_PAGESIZE);
    manager = hwpoison_connect(NULL);
    if (!manager) {
        fprintf(stderr, "%s\n", hwpoison_error());
        return 1;
    }
    table = hwpoison_attach(manager, "table");
    MUST(table);
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++)
        if (count > 1 && !strcmp(tests[i].name, arguments[1])) {
            tests[i].test();
            hwpoison_disconnect(manager);
            say("done");
            return 0;
        }
    return 2;
}
