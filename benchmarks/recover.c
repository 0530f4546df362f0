/*
 * The floor of a recovery: a clean, mapped page of a file object is taken away, quarantined, read again
 * and given back, while a client reads it all the time.
 *
 *     recover FILE ROUNDS
 *
 * The manager and the reader have a CPU each. A round is timed from the manager's first system call until
 * the reader, in the client, has the right byte of the new page in its hand:
 *
 *     pin the frame (splice), punch the page out, check that it is gone, move the frame to the
 *     quarantine (splice), read the page from FILE, publish it (UFFDIO_COPY), UFFDIO_WAKE
 *
 * Which read is the measured one
 *
 * The reader touches the page in a tight loop, so most of its reads find the page present, and one that
 * ends during a round may have taken its byte from the old frame and been preempted before it looked
 * at the clock. The measured read is the one that *slept in the page fault*. The reader knows it from
 * the kernel: its count of voluntary context switches (getrusage) has grown. Nothing else in its loop
 * sleeps, and preemption is counted apart. A page that is present is read without sleeping, so a read
 * that slept met the page absent, which it is from the punch until the publication and at no other time.
 * The manager checks what follows from that: the read ended after the publication had begun. A round
 * without such a read (the reader was preempted while the page was absent) is done again, not counted.
 *
 * Where it slept is the kernel's choice: a fault on a page that is being punched waits, inside the
 * kernel, for the end of the punch, and only then becomes an event for the manager. A manager as fast
 * as this one has published by then, so most readers sleep once and never become an event. A slower
 * manager makes them sleep a second time, until its WAKE. Hence the second measurement, "after_event":
 * the same calls, but before it publishes the manager waits for the reader's event and reads it.
 *
 * Prints {"count", "mean_us", "p50_us", "p99_us", "after_event": {"mean_us", "p50_us", "p99_us"}}.
 */
#include "floor.h"
#include <stdatomic.h>
#include <sys/resource.h>

/* What the reader tells. The fields in the middle belong to the latest sleep, and are written before it. */
struct reader {
	size_t offset;          /* of the byte that it reads: set before it starts */
	unsigned char got;      /* what the read that slept has read */
	uint64_t ended_ns;      /* when it had it */
	_Atomic uint64_t slept; /* reads that slept */
	_Atomic uint64_t reads; /* all reads, each counted when what it has to tell is told */
};

struct manager {
	int file, object;
	struct own_mapping own;
	struct client client;
	struct reader *reader;
	size_t page;             /* offset of the page that is recovered */
	unsigned char expected;  /* the right byte */
	char *buffer;            /* a page */
	int pin[2], quarantine[2];
	size_t held, held_max;   /* frames in the quarantine, and how many it can hold */
};

static long voluntary_switches(void)
{
	struct rusage usage;

	getrusage(RUSAGE_THREAD, &usage);
	return usage.ru_nvcsw;
}

/* The client. */
static void read_for_ever(const volatile unsigned char *memory, void *context)
{
	struct reader *reader = context;
	const volatile unsigned char *byte = memory + reader->offset;
	long switches = voluntary_switches();

	for (;;) {
		unsigned char got = *byte;
		uint64_t ended_ns = now_ns();
		long switches_now = voluntary_switches();
		if (switches_now != switches) {
			switches = switches_now;
			reader->got = got;
			reader->ended_ns = ended_ns;
			atomic_fetch_add(&reader->slept, 1);
		}
		atomic_fetch_add(&reader->reads, 1);
	}
}

/*
 * Wait for the event of a fault, at most this long, and read it. A reader may find the page absent
 * just before it is published and go to sleep just after the WAKE, so events also come late: whoever
 * waits for the reader keeps answering them.
 */
static int take_event(const struct manager *manager, long timeout_us)
{
	struct pollfd watched = {.fd = manager->client.faults, .events = POLLIN};
	struct timespec timeout = {.tv_sec = timeout_us / 1000000, .tv_nsec = timeout_us % 1000000 * 1000};
	uintptr_t address;

	if (ppoll(&watched, 1, &timeout, NULL) < 0)
		fail_call("ppoll");
	return watched.revents & POLLIN && read_fault(manager->client.faults, &address);
}

/* Let the reader complete some reads. Returns at once when it tells of another sleep than `slept_before`. */
static void await_reads(const struct manager *manager, uint64_t reads, uint64_t slept_before)
{
	struct reader *reader = manager->reader;
	uint64_t goal = atomic_load(&reader->reads) + reads;
	uint64_t deadline = now_ns() + PATIENCE_MS * UINT64_C(1000000);

	while (atomic_load(&reader->reads) < goal && atomic_load(&reader->slept) == slept_before) {
		if (take_event(manager, 100))
			wake(manager->client.faults, manager->client.address + manager->page);
		if (now_ns() > deadline)
			fail("the reader has not read the page within %d ms", PATIENCE_MS);
	}
}

/* One round. Returns whether the reader slept, and with it how long it had to wait. */
static int recover_page(struct manager *manager, int after_event, uint64_t *took_ns)
{
	struct reader *reader = manager->reader;
	loff_t offset = (loff_t)manager->page;
	uint64_t slept_before = atomic_load(&reader->slept);

	uint64_t start_ns = now_ns();
	splice_page(manager->object, &offset, manager->pin[1]);
	punch_page(manager->object, manager->page);
	check_absent(manager->object, manager->page);
	splice_page(manager->pin[0], NULL, manager->quarantine[1]);
	read_page(manager->file, manager->buffer, manager->page);
	if (after_event && !take_event(manager, PATIENCE_MS * 1000L))
		fail("the reader has not met the absent page within %d ms", PATIENCE_MS);
	uint64_t publish_ns = now_ns();
	publish(manager->own, manager->page, manager->buffer);
	wake(manager->client.faults, manager->client.address + manager->page);

	/* The first of two more reads may have begun before the round, the second one has not. */
	await_reads(manager, 2, slept_before);
	if (atomic_load(&reader->slept) == slept_before || reader->ended_ns < publish_ns)
		return 0;
	if (reader->got != manager->expected)
		fail("the reader has read %u, but FILE has %u", reader->got, manager->expected);
	*took_ns = reader->ended_ns - start_ns;
	return 1;
}

static struct figures measure(struct manager *manager, int after_event, size_t rounds)
{
	uint64_t *took_ns = malloc(rounds * sizeof *took_ns);
	size_t counted = 0;

	if (!took_ns)
		fail_call("malloc");
	for (size_t tried = 0; counted < rounds; tried++) {
		if (tried > 100 + 20 * rounds)
			fail("the reader slept in only %zu of %zu rounds: is the machine too busy?", counted, tried);
		/* The page is mapped again, and the reader at full speed, when the round begins. */
		await_reads(manager, 200, atomic_load(&manager->reader->slept));
		counted += (size_t)recover_page(manager, after_event, &took_ns[counted]);
		if (++manager->held == manager->held_max)
			for (; manager->held; manager->held--)
				release_page(manager->quarantine[0], manager->buffer);
	}
	struct figures figures = figures_of(took_ns, rounds);
	free(took_ns);
	return figures;
}

/* A byte that is not zero, so that a page of zeros is not taken for the right one: from the middle on. */
static void choose_byte(struct manager *manager, size_t pages)
{
	for (size_t i = 0; i < pages; i++) {
		manager->page = (pages / 2 + i) % pages * page_size();
		read_page(manager->file, manager->buffer, manager->page);
		for (size_t byte = 0; byte < page_size(); byte++) {
			if (manager->buffer[byte]) {
				manager->expected = (unsigned char)manager->buffer[byte];
				manager->reader->offset = manager->page + byte;
				return;
			}
		}
	}
	fail("FILE has only zeros: a wrong page could not be told from the right one");
}

int main(int count, char **arguments)
{
	if (count != 3)
		fail("usage: recover FILE ROUNDS");
	size_t nbytes;
	struct manager manager = {.file = open_file(arguments[1], &nbytes)};
	size_t rounds = number_argument(arguments[2], "ROUNDS");
	size_t pages = (nbytes + page_size() - 1) / page_size(), size = pages * page_size();

	warm_file(manager.file);
	manager.reader = shared_memory(sizeof *manager.reader);
	manager.buffer = aligned_alloc(page_size(), page_size());
	if (!manager.buffer)
		fail_call("aligned_alloc");
	choose_byte(&manager, pages);
	new_pipe(manager.pin);
	new_pipe(manager.quarantine);
	manager.held_max = (size_t)fcntl(manager.quarantine[1], F_GETPIPE_SZ) / page_size();
	manager.object = new_object(size);

	/*
	 * A reader that reads all the time runs beside the manager: each has a CPU. On one CPU the two would take
	 * turns, and a round could pass with no reader running.
	 */
	int manager_cpu = allowed_cpu(0), reader_cpu = allowed_cpu(1);
	stay_on_cpu(reader_cpu); /* the client inherits it */
	manager.client = start_client(manager.object, size, read_for_ever, manager.reader);
	stay_on_cpu(manager_cpu);
	manager.own = map_own(manager.object, size);

	/* The first touch. */
	read_page(manager.file, manager.buffer, manager.page);
	publish(manager.own, manager.page, manager.buffer);
	wake(manager.client.faults, manager.client.address + manager.page);

	struct figures at_once = measure(&manager, 0, rounds);
	struct figures after_event = measure(&manager, 1, rounds);
	end_client(manager.client);
	printf("{\"count\": %zu, \"mean_us\": %.2f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"after_event\": "
	       "{\"mean_us\": %.2f, \"p50_us\": %.2f, \"p99_us\": %.2f}}\n",
	       rounds, at_once.mean_us, at_once.p50_us, at_once.p99_us,
	       after_event.mean_us, after_event.p50_us, after_event.p99_us);
	return 0;
}
