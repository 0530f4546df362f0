/*
 * The floor of loading a whole file into an object: sendfile() from the page cache into a memfd.
 *
 *     load FILE
 *
 * FILE is read once before, so that it is cached. Each run fills a new memfd, so that the time has the
 * allocation of the memory in it, as loading has; freeing the memfd of the run before is not timed.
 *
 * Prints {"nbytes", "runs", "bytes_per_second", "best_bytes_per_second"}: the median run and the best.
 */
#include "floor.h"
#include <sys/sendfile.h>

enum { RUNS = 5 };

static uint64_t load_ns(int file, size_t nbytes)
{
	uint64_t start = now_ns();
	int object = new_object(nbytes);
	off_t offset = 0;

	while ((size_t)offset < nbytes) { /* one call moves 2 GiB at most */
		ssize_t moved = sendfile(object, file, &offset, nbytes - (size_t)offset);
		if (moved < 0)
			fail_call("sendfile of FILE into the memfd");
		if (moved == 0)
			fail("FILE became shorter while it was loaded");
	}
	uint64_t took = now_ns() - start;
	close(object);
	return took;
}

int main(int count, char **arguments)
{
	if (count != 2)
		fail("usage: load FILE");
	size_t nbytes;
	int file = open_file(arguments[1], &nbytes);
	uint64_t took_ns[RUNS];

	warm_file(file);
	for (int run = 0; run < RUNS; run++)
		took_ns[run] = load_ns(file, nbytes);
	qsort(took_ns, RUNS, sizeof *took_ns, compare_ns);
	printf("{\"nbytes\": %zu, \"runs\": %d, \"bytes_per_second\": %.0f, \"best_bytes_per_second\": %.0f}\n",
	       nbytes, RUNS, (double)nbytes * 1e9 / (double)took_ns[RUNS / 2],
	       (double)nbytes * 1e9 / (double)took_ns[0]);
	return 0;
}
