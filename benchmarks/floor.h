/*
 * What the floor programs share: failing, time, userfaultfd, clients, figures.
 *
 * A floor does with raw system calls what hwpoison does, and nothing else, so that the difference
 * between the two figures is the cost of hwpoison. Only what two floors need belongs here; what is
 * measured stands in the floors themselves.
 *
 * The functions are inline so that a floor may leave some of them unused without a warning.
 */
#ifndef FLOOR_H
#define FLOOR_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef UFFD_USER_MODE_ONLY /* Linux 5.11 */
#define UFFD_USER_MODE_ONLY 1
#endif

/* Nothing in a floor takes this long. Whoever waits longer would wait for ever. */
#define PATIENCE_MS 10000

/* ---- Failing ---- */

/* One line on standard error and status 2. Clients die with the process that started them. */
__attribute__((noreturn, format(printf, 1, 2)))
static inline void fail(const char *format, ...)
{
	char line[512];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(line, sizeof line, format, arguments);
	va_end(arguments);
	fprintf(stderr, "%s: %s\n", program_invocation_short_name, line);
	_exit(2);
}

/* Fail with the reason that the last system call left in errno. */
__attribute__((noreturn))
static inline void fail_call(const char *what)
{
	fail("%s: %s", what, strerror(errno));
}

static inline size_t number_argument(const char *text, const char *name)
{
	char *end;
	errno = 0;
	unsigned long number = strtoul(text, &end, 10);

	if (errno || *end || *text < '0' || *text > '9' || number == 0)
		fail("%s must be a whole number above 0, not '%s'", name, text);
	return number;
}

/* ---- Time and figures ---- */

static inline uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline int compare_ns(const void *left, const void *right)
{
	uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
	return (a > b) - (a < b);
}

struct figures {
	double mean_us, p50_us, p99_us;
};

/* Percentiles by nearest rank: each one is a value that was measured. Sorts `ns` in place. */
static inline struct figures figures_of(uint64_t *ns, size_t count)
{
	double sum = 0;

	qsort(ns, count, sizeof *ns, compare_ns);
	for (size_t i = 0; i < count; i++)
		sum += (double)ns[i];
	return (struct figures){
		.mean_us = sum / (double)count / 1e3,
		.p50_us = (double)ns[(count * 50 + 99) / 100 - 1] / 1e3,
		.p99_us = (double)ns[(count * 99 + 99) / 100 - 1] / 1e3,
	};
}

/* ---- CPUs ---- */

/* The first (0), second (1), ... CPU that this process may run on. */
static inline int allowed_cpu(int which)
{
	cpu_set_t allowed;

	if (sched_getaffinity(0, sizeof allowed, &allowed))
		fail_call("sched_getaffinity");
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
		if (CPU_ISSET(cpu, &allowed) && which-- == 0)
			return cpu;
	fail("needs two CPUs: one for the manager and one for the client");
}

static inline void stay_on_cpu(int cpu)
{
	cpu_set_t one;

	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	if (sched_setaffinity(0, sizeof one, &one))
		fail_call("sched_setaffinity");
}

/* ---- Memory ---- */

static inline size_t page_size(void)
{
	static size_t size;

	if (!size)
		size = (size_t)sysconf(_SC_PAGESIZE);
	return size;
}

/* Memory that a floor and its clients see alike. Zeros at first. */
static inline void *shared_memory(size_t size)
{
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		fail_call("mmap of shared memory");
	return memory;
}

static inline int new_object(size_t size)
{
	int object = memfd_create("object", MFD_CLOEXEC);

	if (object < 0)
		fail_call("memfd_create");
	if (ftruncate(object, (off_t)size))
		fail_call("ftruncate of the memfd");
	return object;
}

/* ---- Files ---- */

static inline int open_file(const char *path, size_t *nbytes)
{
	struct stat status;
	int file = open(path, O_RDONLY | O_CLOEXEC);

	if (file < 0 || fstat(file, &status))
		fail("%s: %s", path, strerror(errno));
	if (!S_ISREG(status.st_mode) || status.st_size == 0)
		fail("%s: must be a regular file that is not empty", path);
	*nbytes = (size_t)status.st_size;
	return file;
}

/* Read the whole file once, so that the page cache has it: a floor measures memory, not a disk. */
static inline void warm_file(int file)
{
	static char buffer[1 << 20];
	off_t offset = 0;
	ssize_t got;

	while ((got = pread(file, buffer, sizeof buffer, offset)) > 0)
		offset += got;
	if (got < 0)
		fail_call("pread of FILE");
}

/* Read one page of the file. What lies behind the end of the file is zeros. */
static inline void read_page(int file, void *buffer, size_t offset)
{
	ssize_t got = pread(file, buffer, page_size(), (off_t)offset);

	if (got <= 0)
		fail_call("pread of a page of FILE");
	if ((size_t)got < page_size())
		memset((char *)buffer + got, 0, page_size() - (size_t)got);
}

/* ---- Userfaultfd ---- */

/*
 * The three ways to open one, the most capable first: root's system call, the device, and user mode,
 * which anybody has and which is enough here (only touches from user mode are measured).
 */
static inline int new_userfaultfd(void)
{
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};
	int faults = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

#ifdef USERFAULTFD_IOC_NEW /* Linux 6.1 */
	if (faults < 0) {
		int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
		if (device >= 0) {
			faults = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
			close(device);
		}
	}
#endif
	if (faults < 0)
		faults = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	if (faults < 0)
		fail_call("userfaultfd");
	if (ioctl(faults, UFFDIO_API, &api))
		fail_call("UFFDIO_API with missing faults of shared memory");
	return faults;
}

static inline void register_missing(int faults, void *address, size_t size)
{
	struct uffdio_register range = {
		.range = {.start = (uintptr_t)address, .len = size},
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	if (ioctl(faults, UFFDIO_REGISTER, &range))
		fail_call("UFFDIO_REGISTER");
}

/* Read one missing-page event, if there is one. Its address is that of the page. */
static inline int read_fault(int faults, uintptr_t *address)
{
	struct uffd_msg message;
	ssize_t got = read(faults, &message, sizeof message);

	if (got < 0 && errno == EAGAIN)
		return 0;
	if (got != (ssize_t)sizeof message)
		fail_call("read of the userfaultfd");
	if (message.event != UFFD_EVENT_PAGEFAULT)
		fail("unexpected userfaultfd event %#x", message.event);
	*address = (uintptr_t)message.arg.pagefault.address & ~(uintptr_t)(page_size() - 1);
	return 1;
}

/* Let every thread of the client that sleeps on this page try again. */
static inline void wake(int faults, uintptr_t address)
{
	struct uffdio_range range = {.start = address, .len = page_size()};

	if (ioctl(faults, UFFDIO_WAKE, &range))
		fail_call("UFFDIO_WAKE");
}

/* ---- The manager's own mapping ---- */

/*
 * The manager publishes pages by UFFDIO_COPY into a registered mapping of its own: the page enters the
 * memfd, for all who map it, and no lock of a client is involved. It wakes nobody (nobody sleeps in this
 * mapping), hence DONTWAKE here and a WAKE on each sleeping client's descriptor.
 */
struct own_mapping {
	int faults;
	char *address;
};

static inline struct own_mapping map_own(int object, size_t size)
{
	struct own_mapping own = {.faults = new_userfaultfd()};

	own.address = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, object, 0);
	if (own.address == MAP_FAILED)
		fail_call("mmap of the memfd");
	register_missing(own.faults, own.address, size);
	return own;
}

static inline void publish(struct own_mapping own, size_t offset, const void *content)
{
	struct uffdio_copy copy = {
		.dst = (uintptr_t)own.address + offset,
		.src = (uintptr_t)content,
		.len = page_size(),
		.mode = UFFDIO_COPY_MODE_DONTWAKE,
	};

	if (ioctl(own.faults, UFFDIO_COPY, &copy))
		fail_call("UFFDIO_COPY");
}

/* ---- Taking a page out ---- */

/* Move one page into a pipe. From the memfd this pins the frame: it stays allocated until the pipe is read. */
static inline void splice_page(int from, loff_t *offset, int pipe_end)
{
	ssize_t moved = splice(from, offset, pipe_end, NULL, page_size(), SPLICE_F_NONBLOCK);

	if (moved < 0)
		fail_call("splice of a page into a pipe");
	if ((size_t)moved != page_size())
		fail("splice moved %zd bytes of a page", moved);
}

/* Take the page from every process at once. */
static inline void punch_page(int object, size_t offset)
{
	if (fallocate(object, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)page_size()))
		fail_call("fallocate(PUNCH_HOLE)");
}

/* A punch that returned 0 may have zeroed the page in place, in the same frame (large folios). */
static inline void check_absent(int object, size_t offset)
{
	off_t data = lseek(object, (off_t)offset, SEEK_DATA);

	if (data == (off_t)offset)
		fail("the page is still present after the punch");
	if (data < 0 && errno != ENXIO) /* ENXIO: no data from here to the end */
		fail_call("lseek(SEEK_DATA)");
}

/* Free a frame that a pipe holds. */
static inline void release_page(int pipe_end, void *scratch)
{
	if (read(pipe_end, scratch, page_size()) != (ssize_t)page_size())
		fail_call("read of a page from a pipe");
}

static inline void new_pipe(int ends[2])
{
	if (pipe2(ends, O_CLOEXEC | O_NONBLOCK))
		fail_call("pipe");
}

/* ---- Clients ---- */

/* A process that maps an object, and what the manager was given by it. */
struct client {
	pid_t pid;
	int faults;        /* its userfaultfd */
	uintptr_t address; /* where it maps the object */
};

typedef void client_body(const volatile unsigned char *memory, void *context);

/*
 * The client's side: map the object as read-only file objects are mapped (private and read-only, from a
 * read-only descriptor), register it, hand the userfaultfd over, run.
 */
__attribute__((noreturn))
static inline void be_client(int socket, int object, size_t size, client_body *body, void *context)
{
	char path[64];
	struct client self = {.pid = getpid(), .faults = new_userfaultfd()};
	snprintf(path, sizeof path, "/proc/self/fd/%d", object);
	int read_only = open(path, O_RDONLY | O_CLOEXEC);

	if (read_only < 0)
		fail_call("open of the memfd, read-only");
	void *memory = mmap(NULL, size, PROT_READ, MAP_PRIVATE, read_only, 0);
	if (memory == MAP_FAILED)
		fail_call("mmap of the memfd in a client");
	register_missing(self.faults, memory, size);
	self.address = (uintptr_t)memory;

	char control[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec part = {.iov_base = &self, .iov_len = sizeof self};
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control,
	};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &self.faults, sizeof(int));
	if (sendmsg(socket, &message, MSG_NOSIGNAL) < 0)
		fail_call("sendmsg of the userfaultfd");

	body((const volatile unsigned char *)memory, context);
	_exit(0);
}

/* The client said on standard error why it failed, unless a signal killed it. Never returns when it failed. */
static inline void reap_client(pid_t pid)
{
	int status;

	if (waitpid(pid, &status, 0) != pid)
		fail_call("waitpid of a client");
	if (WIFSIGNALED(status))
		fail("a client was killed by signal %d", WTERMSIG(status));
	if (WEXITSTATUS(status))
		_exit(2);
}

/*
 * Start a client. Must be called before map_own(): a child would inherit that mapping, unregistered, and
 * whoever touches an absent page through such a mapping makes a page of zeros for everybody.
 */
static inline struct client start_client(int object, size_t size, client_body *body, void *context)
{
	int ends[2];
	pid_t parent = getpid();

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
		fail_call("socketpair");
	pid_t pid = fork();
	if (pid < 0)
		fail_call("fork of a client");
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent) /* it died before the line above */
			_exit(2);
		close(ends[0]);
		be_client(ends[1], object, size, body, context);
	}
	close(ends[1]);

	struct client client;
	char control[CMSG_SPACE(sizeof(int))];
	struct iovec part = {.iov_base = &client, .iov_len = sizeof client};
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control,
	};
	ssize_t got = recvmsg(ends[0], &message, MSG_CMSG_CLOEXEC);
	if (got < 0)
		fail_call("recvmsg of the userfaultfd");
	if (got == 0) { /* the client ended before it had anything to send */
		reap_client(pid);
		fail("a client ended before it was attached");
	}
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	if (got != (ssize_t)sizeof client || !header || header->cmsg_type != SCM_RIGHTS)
		fail("a client's userfaultfd did not arrive: is the limit of open files too low?");
	memcpy(&client.faults, CMSG_DATA(header), sizeof(int));
	close(ends[0]);
	return client;
}

/* End a client that does not end by itself. */
static inline void end_client(struct client client)
{
	kill(client.pid, SIGKILL);
	if (waitpid(client.pid, NULL, 0) != client.pid)
		fail_call("waitpid of a client");
}

#endif
