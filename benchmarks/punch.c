/*
 * The floor of a recovery's growth: what it costs to take one page away and give it back when many
 * processes are attached, of which some map the page.
 *
 *     punch PROCESSES MAPPED
 *
 * PROCESSES clients are attached, each with a userfaultfd that the manager holds. MAPPED of them map the
 * whole 64 MiB object, the others an object of their own. A round, timed, is:
 *
 *     pin the frame (splice), punch the page out, check that it is gone, publish it (UFFDIO_COPY),
 *     UFFDIO_WAKE in one client (the manager knows from the events who sleeps, and wakes nobody else)
 *
 * Before each round all MAPPED processes have the page in their page tables. They need not run for it,
 * which would disturb what is measured: they sleep in pause() all the time, and the manager has the
 * kernel fault the page in on their behalf, by reading one byte of it with process_vm_readv().
 *
 * Prints {"processes", "mapped", "rounds", "p50_us", "p99_us", "punch_p50_us"}; the last is the punch alone.
 */
#include "floor.h"
#include <sys/resource.h>
#include <sys/uio.h>

enum { ROUNDS = 200, OBJECT_BYTES = 64 << 20 };

/* The clients. */
static void sleep_for_ever(const volatile unsigned char *memory, void *context)
{
	(void)memory, (void)context;
	for (;;)
		pause();
}

/* The manager holds a descriptor of every client. */
static void allow_many_descriptors(void)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit))
		fail_call("getrlimit");
	limit.rlim_cur = limit.rlim_max;
	if (setrlimit(RLIMIT_NOFILE, &limit))
		fail_call("setrlimit");
}

static void map_in_client(struct client client, size_t page)
{
	char byte;
	struct iovec here = {.iov_base = &byte, .iov_len = 1};
	struct iovec there = {.iov_base = (void *)(client.address + page), .iov_len = 1};

	if (process_vm_readv(client.pid, &here, 1, &there, 1, 0) != 1)
		fail_call("process_vm_readv of a client's page");
	if (byte != 'h')
		fail("a client has the wrong page");
}

int main(int count, char **arguments)
{
	if (count != 3)
		fail("usage: punch PROCESSES MAPPED");
	size_t processes = number_argument(arguments[1], "PROCESSES");
	size_t mapped = number_argument(arguments[2], "MAPPED");
	if (mapped > processes)
		fail("MAPPED is %zu, but PROCESSES only %zu", mapped, processes);

	size_t page = OBJECT_BYTES / 2;
	int object = new_object(OBJECT_BYTES), other = new_object(page_size());
	struct client *clients = calloc(processes, sizeof *clients);
	char *content = aligned_alloc(page_size(), page_size());
	int pin[2];
	uint64_t took_ns[ROUNDS], punch_ns[ROUNDS];
	if (!clients || !content)
		fail_call("malloc");
	memset(content, 'h', page_size());
	allow_many_descriptors();
	new_pipe(pin);
	for (size_t i = 0; i < processes; i++)
		clients[i] = i < mapped ? start_client(object, OBJECT_BYTES, sleep_for_ever, NULL)
		                        : start_client(other, page_size(), sleep_for_ever, NULL);
	struct own_mapping own = map_own(object, OBJECT_BYTES);
	publish(own, page, content);

	for (int round = 0; round < ROUNDS; round++) {
		for (size_t i = 0; i < mapped; i++)
			map_in_client(clients[i], page);

		loff_t offset = (loff_t)page;
		uint64_t start = now_ns();
		splice_page(object, &offset, pin[1]);
		uint64_t punch = now_ns();
		punch_page(object, page);
		punch_ns[round] = now_ns() - punch;
		check_absent(object, page);
		publish(own, page, content);
		wake(clients[0].faults, clients[0].address + page);
		took_ns[round] = now_ns() - start;

		release_page(pin[0], content); /* the same bytes */
	}

	for (size_t i = 0; i < processes; i++)
		kill(clients[i].pid, SIGKILL);
	for (size_t i = 0; i < processes; i++)
		end_client(clients[i]);
	struct figures all = figures_of(took_ns, ROUNDS), punch = figures_of(punch_ns, ROUNDS);
	printf("{\"processes\": %zu, \"mapped\": %zu, \"rounds\": %d, \"p50_us\": %.2f, \"p99_us\": %.2f, "
	       "\"punch_p50_us\": %.2f}\n",
	       processes, mapped, ROUNDS, all.p50_us, all.p99_us, punch.p50_us);
	return 0;
}
