/*
 * The floor of a first touch: one missing page of a file object, answered by another process.
 *
 *     fault FILE PAGES [apart]
 *
 * A client touches PAGES distinct pages of the object in random order, each for the first time, and
 * times each touch. The handler is the smallest there can be: it waits with poll() (as a manager must,
 * that has other descriptors to watch), reads the event, reads the page from FILE, publishes it and
 * wakes the client. No read-ahead: every touch is one fault.
 *
 * What dominates is waking a process, which costs much more on another CPU than on the same one. The
 * scheduler chooses, unless it is told: "apart" gives the handler the first allowed CPU and the client
 * the second.
 *
 * Prints {"count", "mean_us", "p50_us", "p99_us"}.
 */
#include "floor.h"

struct touches {
	int file;
	size_t count;
	size_t *pages;      /* which page each touch goes to */
	uint64_t *took_ns;  /* written by the client */
	unsigned char *got; /* written by the client */
};

/* The first `count` of a random order of `total` pages: the same in each run. */
static size_t *choose_pages(size_t total, size_t count)
{
	size_t *pages = malloc(total * sizeof *pages);
	uint64_t random = 20240607;

	if (!pages)
		fail_call("malloc");
	for (size_t i = 0; i < total; i++)
		pages[i] = i;
	for (size_t i = 0; i < count; i++) {
		random ^= random << 13, random ^= random >> 7, random ^= random << 17; /* xorshift64 */
		size_t other = i + random % (total - i);
		size_t page = pages[other];
		pages[other] = pages[i];
		pages[i] = page;
	}
	return pages;
}

/* The client. */
static void touch_pages(const volatile unsigned char *memory, void *context)
{
	const struct touches *touches = context;

	for (size_t i = 0; i < touches->count; i++) {
		const volatile unsigned char *byte = memory + touches->pages[i] * page_size();
		uint64_t start = now_ns();
		unsigned char got = *byte;
		touches->took_ns[i] = now_ns() - start;
		touches->got[i] = got;
	}
}

/* The handler: answer faults until the client has ended. Returns how many it answered. */
static size_t answer_faults(int file, struct client client, struct own_mapping own)
{
	char *buffer = aligned_alloc(page_size(), page_size());
	int ended = (int)syscall(SYS_pidfd_open, client.pid, 0);
	struct pollfd watched[] = {{.fd = client.faults, .events = POLLIN}, {.fd = ended, .events = POLLIN}};
	size_t answered = 0;
	uintptr_t address;

	if (!buffer)
		fail_call("aligned_alloc");
	if (ended < 0)
		fail_call("pidfd_open");
	for (;;) {
		int ready = poll(watched, 2, PATIENCE_MS);
		if (ready < 0)
			fail_call("poll");
		if (ready == 0)
			fail("the client neither faulted nor ended within %d ms", PATIENCE_MS);
		if (watched[0].revents & POLLIN && read_fault(client.faults, &address)) {
			size_t offset = address - client.address;
			read_page(file, buffer, offset);
			publish(own, offset, buffer);
			wake(client.faults, address);
			answered++;
		} else if (watched[1].revents) {
			break;
		}
	}
	close(ended);
	free(buffer);
	return answered;
}

/* Outside the measurement: every touch must have read what the file has there. */
static void check_bytes(const struct touches *touches)
{
	unsigned char byte;

	for (size_t i = 0; i < touches->count; i++) {
		if (pread(touches->file, &byte, 1, (off_t)(touches->pages[i] * page_size())) != 1)
			fail_call("pread of FILE");
		if (byte != touches->got[i])
			fail("page %zu read %u, but FILE has %u", touches->pages[i], touches->got[i], byte);
	}
}

int main(int count, char **arguments)
{
	int apart = count == 4 && !strcmp(arguments[3], "apart");
	if (count != 3 && !apart)
		fail("usage: fault FILE PAGES [apart]");
	size_t nbytes;
	int file = open_file(arguments[1], &nbytes);
	size_t pages = number_argument(arguments[2], "PAGES");
	int handler_cpu = allowed_cpu(0);
	size_t total = (nbytes + page_size() - 1) / page_size(), size = total * page_size();
	if (pages > total)
		fail("PAGES is %zu, but FILE has only %zu", pages, total);
	warm_file(file);

	struct touches touches = {
		.file = file,
		.count = pages,
		.pages = choose_pages(total, pages),
		.took_ns = shared_memory(pages * sizeof *touches.took_ns),
		.got = shared_memory(pages),
	};
	int object = new_object(size);
	if (apart)
		stay_on_cpu(allowed_cpu(1)); /* the client inherits it */
	struct client client = start_client(object, size, touch_pages, &touches);
	if (apart)
		stay_on_cpu(handler_cpu);
	struct own_mapping own = map_own(object, size);
	size_t answered = answer_faults(file, client, own);
	reap_client(client.pid);
	if (answered != pages)
		fail("%zu touches made %zu faults", pages, answered);
	check_bytes(&touches);

	struct figures figures = figures_of(touches.took_ns, pages);
	printf("{\"count\": %zu, \"mean_us\": %.2f, \"p50_us\": %.2f, \"p99_us\": %.2f}\n",
	       pages, figures.mean_us, figures.p50_us, figures.p99_us);
	return 0;
}
