/* See hwpoison.h, and docs/protocol.md for what is said on the wire. Needs POSIX threads and Linux 5.19. Apache-2.0. */
#define _GNU_SOURCE
#include "hwpoison.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/ioctl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

enum {
    VERSION = 3,
    MESSAGE_LIMIT = 192 << 10,
    DATA_LIMIT = 128 << 10,
    DESCRIPTORS_MAX = 4,
    /* So often one manager may close the channel of a request before that counts as its answer. */
    REFUSALS_MAX = 3,
    CONNECT_ATTEMPTS = 10,
    /* How long a manager that could not take a channel may need to say so. */
    REFUSAL_MILLISECONDS = 20,
    /* So many channels that are closed without a word, one after the other: managers do not die so often. */
    CHANNEL_ATTEMPTS = 100,
    DEPTH_MAX = 16,
    /* Larger than any page. So many places are tried for a mapping. */
    PLACE_ALIGNMENT = 1 << 20,
    PLACES_MAX = 16,
};

/* linux/userfaultfd.h, which an older system's headers may have without what is used here. */
#define UFFD_API_NUMBER 0xAAull
#define UFFD_IOC_API _IOWR(0xAA, 0x3F, struct uffd_api)
#define UFFD_IOC_REGISTER _IOWR(0xAA, 0x00, struct uffd_register)
#define UFFD_IOC_WRITEPROTECT _IOWR(0xAA, 0x06, struct uffd_writeprotect)
#define UFFD_IOC_NEW _IO(0xAA, 0x00)
#define UFFD_USER_MODE_ONLY_FLAG 1
#define UFFD_NEEDED (1ull << 5 | 1ull << 8 | 1ull << 12) /* missing pages of shmem, thread ids, write protection of shmem */
#define UFFD_POISON (1ull << 14)

struct uffd_api {
    uint64_t api, features, ioctls;
};
struct uffd_register {
    uint64_t start, len, mode, ioctls;
};
struct uffd_writeprotect {
    uint64_t start, len, mode;
};

struct mapping {
    void *address;
    size_t nbytes;
    uint64_t number;
    int64_t slot;
    uint64_t errors;
};

struct hwpoison_memory {
    hwpoison_manager *manager;
    hwpoison_memory *next;
    uint64_t object, nbytes;
    char *name;
    bool writable, protect;
    int fd;
    struct mapping plain;
    atomic_uint_least64_t residence;
    /* Of the guarded view: */
    pthread_mutex_t lock;
    struct mapping view;
    uint64_t clean; /* up to which count all zeros are gone again */
    hwpoison_guard *guards;
    uint64_t open;
};

struct hwpoison_guard {
    hwpoison_memory *memory;
    hwpoison_guard *next;
    uint64_t seen;
};

struct hwpoison_manager {
    hwpoison_manager *next;
    int control, channel, userfaultfd, lifeline;
    int coming, other; /* a channel that the manager has not taken yet, the lifeline's other end until it has that */
    int arrived[DESCRIPTORS_MAX]; /* descriptors of a reply that nobody has taken yet */
    bool user_mode, armed;
    size_t page_size;
    atomic_uint_least64_t *board;
    size_t board_nbytes;
    uint64_t numbers, life; /* how many managers there were, as far as is known here */
    /* Held while something is asked. */
    pthread_mutex_t lock;
    /* Held, beside that, while the list changes. */
    pthread_mutex_t memories_lock;
    hwpoison_memory *memories;
    uint8_t *packet, *large, *told;
    size_t nbytes;
    /* Of notices: */
    pthread_mutex_t notices_lock;
    int notices, listening, standing_event;
    uint64_t last;
    uint8_t *standing;
    size_t standing_at, standing_end, standing_left;
};

/* --- what went wrong */

static _Thread_local char message[1024];

const char *hwpoison_error(void) { return message; }

static int failed(int number, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    errno = number;
    return -1;
}

static int failed_by(const char *what) {
    int number = errno;
    return failed(number, "%s: %s", what, strerror(number));
}

static void close_fd(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* --- msgpack: what is said is built in the manager's packet */

static void put(hwpoison_manager *manager, const void *bytes, size_t nbytes) {
    /* One byte more than the limit is enough to be refused. */
    if (manager->nbytes + nbytes > MESSAGE_LIMIT) {
        manager->nbytes = MESSAGE_LIMIT + 1;
        return;
    }
    memcpy(manager->packet + manager->nbytes, bytes, nbytes);
    manager->nbytes += nbytes;
}

static void put_big_endian(hwpoison_manager *manager, uint8_t kind, uint64_t value, int nbytes) {
    uint8_t bytes[9] = {kind};
    for (int i = 0; i < nbytes; i++)
        bytes[1 + i] = (uint8_t)(value >> 8 * (nbytes - 1 - i));
    put(manager, bytes, (size_t)nbytes + 1);
}

static void put_number(hwpoison_manager *manager, uint64_t value) { put_big_endian(manager, 0xcf, value, 8); }

static void put_truth(hwpoison_manager *manager, bool value) { put(manager, value ? "\xc3" : "\xc2", 1); }

static void put_nothing(hwpoison_manager *manager) { put(manager, "\xc0", 1); }

static void put_text(hwpoison_manager *manager, const char *text) {
    size_t nbytes = strlen(text);
    put_big_endian(manager, 0xdb, nbytes, 4);
    put(manager, text, nbytes);
}

static void put_bytes(hwpoison_manager *manager, const void *bytes, size_t nbytes) {
    put_big_endian(manager, 0xc6, nbytes, 4);
    put(manager, bytes, nbytes);
}

/* A message begins with its name; `fields` follow. */
static void begin(hwpoison_manager *manager, const char *name, unsigned fields) {
    uint8_t kind = (uint8_t)(0x90 | (fields + 1));
    manager->nbytes = 0;
    put(manager, &kind, 1);
    put_text(manager, name);
}

/* --- msgpack: what is read */

typedef struct {
    const uint8_t *at, *end;
    bool wrong;
} reader;

static uint64_t big_endian(reader *in, int nbytes) {
    uint64_t value = 0;
    if (in->end - in->at < nbytes) {
        in->wrong = true;
        return 0;
    }
    for (int i = 0; i < nbytes; i++)
        value = value << 8 | *in->at++;
    return value;
}

enum kind { NOTHING, NUMBER, REAL, TRUTH, TEXT, ARRAY, MAP };

typedef struct {
    enum kind kind;
    uint64_t number; /* or how many: bytes, items, pairs */
    double real;
    const char *text;
} value;

static value next(reader *in) {
    value found = {.kind = NOTHING};
    uint8_t kind = (uint8_t)big_endian(in, 1);
    if (in->wrong || kind == 0xc0)
        return found;
    found.kind = NUMBER;
    if (kind < 0x80)
        found.number = kind;
    else if (kind >= 0xe0)
        found.number = (uint64_t)(int64_t)(int8_t)kind;
    else if (kind >= 0xcc && kind <= 0xcf)
        found.number = big_endian(in, 1 << (kind - 0xcc));
    else if (kind >= 0xd0 && kind <= 0xd3) {
        int nbytes = 1 << (kind - 0xd0);
        uint64_t raw = big_endian(in, nbytes);
        found.number = (uint64_t)((int64_t)(raw << (64 - 8 * nbytes)) >> (64 - 8 * nbytes));
    } else if (kind == 0xc2 || kind == 0xc3) {
        found.kind = TRUTH;
        found.number = kind == 0xc3;
    } else if (kind == 0xcb) {
        uint64_t raw = big_endian(in, 8);
        found.kind = REAL;
        memcpy(&found.real, &raw, 8);
    } else if (kind >= 0xa0 && kind < 0xc0) {
        found.kind = TEXT;
        found.number = kind & 0x1f;
    } else if ((kind >= 0xd9 && kind <= 0xdb) || (kind >= 0xc4 && kind <= 0xc6)) {
        found.kind = TEXT;
        found.number = big_endian(in, 1 << (kind >= 0xd9 ? kind - 0xd9 : kind - 0xc4));
    } else if (kind >= 0x90 && kind < 0xa0) {
        found.kind = ARRAY;
        found.number = kind & 0x0f;
    } else if (kind == 0xdc || kind == 0xdd) {
        found.kind = ARRAY;
        found.number = big_endian(in, kind == 0xdc ? 2 : 4);
    } else if (kind >= 0x80 && kind < 0x90) {
        found.kind = MAP;
        found.number = kind & 0x0f;
    } else if (kind == 0xde || kind == 0xdf) {
        found.kind = MAP;
        found.number = big_endian(in, kind == 0xde ? 2 : 4);
    } else
        in->wrong = true;
    if (found.kind == TEXT) {
        if ((uint64_t)(in->end - in->at) < found.number)
            in->wrong = true;
        else {
            found.text = (const char *)in->at;
            in->at += found.number;
        }
    }
    return found;
}

static value want(reader *in, enum kind kind) {
    value found = next(in);
    if (found.kind != kind)
        in->wrong = true;
    return found;
}

static void skip_within(reader *in, int depth) {
    value found = next(in);
    uint64_t items = found.kind == ARRAY ? found.number : found.kind == MAP ? 2 * found.number : 0;
    if (items && depth == DEPTH_MAX)
        in->wrong = true;
    for (; items && !in->wrong; items--)
        skip_within(in, depth + 1);
}

static void skip(reader *in) { skip_within(in, 0); }

static bool is(value found, const char *text) {
    return found.kind == TEXT && found.text && found.number == strlen(text) && !memcmp(found.text, text, found.number);
}

static void copy_text(value found, char *to, size_t nbytes) {
    size_t length = found.kind == TEXT ? found.number : 0;
    if (length >= nbytes)
        length = nbytes - 1;
    if (length && found.text)
        memcpy(to, found.text, length);
    to[length] = 0;
}

/* --- one packet */

static int send_packet(int channel, const void *bytes, size_t nbytes, const int *fds, size_t count) {
    char control[CMSG_SPACE(DESCRIPTORS_MAX * sizeof(int))] = {0};
    struct iovec part = {(void *)bytes, nbytes};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        header.msg_control = control;
        header.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *one = CMSG_FIRSTHDR(&header);
        one->cmsg_level = SOL_SOCKET;
        one->cmsg_type = SCM_RIGHTS;
        one->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(one), fds, count * sizeof(int));
    }
    ssize_t sent;
    do
        sent = sendmsg(channel, &header, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? -1 : 0;
}

/* --- channels */

/* All that there are; held where a fork must wait. */
static hwpoison_manager *managers;
static pthread_mutex_t managers_lock = PTHREAD_MUTEX_INITIALIZER;

/* A child that is forked meanwhile finds a descriptor either there, and closes it, or not made yet. */
static void let_go(int *fd) {
    pthread_mutex_lock(&managers_lock);
    close_fd(fd);
    pthread_mutex_unlock(&managers_lock);
}

static void let_go_of_arrived(hwpoison_manager *manager) {
    for (int i = 0; i < DESCRIPTORS_MAX; i++)
        let_go(&manager->arrived[i]);
}

/* A descriptor has another place now, or had: one that a child finds there, too. */
static void move_fd(int *from, int *to) {
    pthread_mutex_lock(&managers_lock);
    *to = *from;
    *from = -1;
    pthread_mutex_unlock(&managers_lock);
}

/* The bytes of a packet; 0 if the other end is gone. Its descriptors are in `manager->arrived`. With `now`, -1 and EAGAIN if
 * there is none. */
static ssize_t receive_packet(hwpoison_manager *manager, int channel, uint8_t *bytes, bool now) {
    char control[CMSG_SPACE(DESCRIPTORS_MAX * sizeof(int))];
    struct iovec part = {bytes, MESSAGE_LIMIT};
    ssize_t nbytes;
    let_go_of_arrived(manager);
    for (;;) {
        struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        struct pollfd there = {channel, POLLIN, 0};
        if (!now && poll(&there, 1, -1) < 0 && errno != EINTR)
            return -1;
        /* A fork waits, and finds them where they belong. */
        pthread_mutex_lock(&managers_lock);
        nbytes = recvmsg(channel, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        int number = errno;
        for (struct cmsghdr *one = nbytes < 0 ? NULL : CMSG_FIRSTHDR(&header); one; one = CMSG_NXTHDR(&header, one))
            if (one->cmsg_level == SOL_SOCKET && one->cmsg_type == SCM_RIGHTS)
                memcpy(manager->arrived, CMSG_DATA(one), one->cmsg_len - CMSG_LEN(0));
        pthread_mutex_unlock(&managers_lock);
        if (nbytes < 0 && (number == EINTR || (number == EAGAIN && !now)))
            continue;
        if (nbytes <= 0)
            let_go_of_arrived(manager);
        errno = number;
        if (nbytes < 0 || !(header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)))
            return nbytes;
        let_go_of_arrived(manager);
        return failed(EMFILE, "this process has no file descriptors left, or the message is too long");
    }
}

/* What is behind ["Failed", ...]. */
static int refused_channel(reader *in) {
    skip(in);
    value number = next(in), text = next(in);
    bool said = !in->wrong && number.kind == NUMBER && text.kind == TEXT;
    return failed(said && number.number ? (int)number.number : EMFILE, "the manager takes no channel: %.*s",
                  said ? (int)text.number : 30, said ? text.text : "it does not say why in full");
}

/* A new socket pair, of which the manager has the other end: asked for on the first channel, which outlives the manager. Its
 * answer comes by the new one, which takes the place of what is at `channel`. With the lock held. */
static int new_channel(hwpoison_manager *manager, const char *request, uint64_t after, int *channel) {
    uint8_t *answer = manager->packet + MESSAGE_LIMIT;
    for (int attempt = 0; attempt < CHANNEL_ATTEMPTS; attempt++) {
        int pair[2];
        /* A child that is forked meanwhile would keep the other end open for ever. */
        pthread_mutex_lock(&managers_lock);
        if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) {
            pthread_mutex_unlock(&managers_lock);
            return failed_by("no channel to the manager");
        }
        bool listens = !strcmp(request, "Listen");
        uint8_t asked[64] = {(uint8_t)(listens ? 0x92 : 0x91), (uint8_t)(0xa0 | strlen(request))};
        size_t nbytes = 2 + strlen(request);
        memcpy(asked + 2, request, strlen(request));
        if (listens) {
            asked[nbytes++] = 0xcf;
            for (int i = 7; i >= 0; i--)
                asked[nbytes++] = (uint8_t)(after >> 8 * i);
        }
        int sent = send_packet(manager->control, asked, nbytes, &pair[1], 1);
        close(pair[1]);
        manager->coming = pair[0];
        pthread_mutex_unlock(&managers_lock);
        if (sent) {
            let_go(&manager->coming);
            return failed(ECONNRESET, "the manager is gone, and its keeper");
        }
        ssize_t got = recv(manager->coming, answer, MESSAGE_LIMIT, 0);
        while (got < 0 && errno == EINTR)
            got = recv(manager->coming, answer, MESSAGE_LIMIT, 0);
        if (got > 0) {
            reader in = {answer, answer + got, false};
            want(&in, ARRAY);
            value name = next(&in);
            if (is(name, "Added")) {
                manager->life = want(&in, NUMBER).number;
                pthread_mutex_lock(&managers_lock);
                close_fd(channel);
                *channel = manager->coming;
                manager->coming = -1;
                pthread_mutex_unlock(&managers_lock);
                return 0;
            }
            let_go(&manager->coming);
            return refused_channel(&in);
        }
        let_go(&manager->coming);
        /* It is dead, or could not take the descriptor: then it says so where it was asked. Else the next one is asked. */
        struct pollfd said = {manager->control, POLLIN, 0};
        if (poll(&said, 1, REFUSAL_MILLISECONDS) > 0) {
            ssize_t refused = receive_packet(manager, manager->control, answer, true);
            let_go_of_arrived(manager);
            if (!refused)
                return failed(ECONNRESET, "the manager is gone, and its keeper");
            if (refused > 0) {
                reader in = {answer, answer + refused, false};
                want(&in, ARRAY);
                next(&in);
                return refused_channel(&in);
            }
        }
    }
    return failed(ECONNRESET, "the manager takes no channel, and does not say why");
}

/* Ask what is in the packet; the reply is what `in` reads, and its descriptors are in `manager->arrived`. With the lock held. The
 * next manager is asked again if this one dies: every request may be asked twice. */
static int ask(hwpoison_manager *manager, int channel, const char *reply, reader *in, const int *fds, size_t count) {
    uint8_t *answer = manager->packet + MESSAGE_LIMIT;
    ssize_t nbytes;
    if (manager->nbytes > MESSAGE_LIMIT)
        return failed(EMSGSIZE, "a message has at most %d bytes: choose a shorter name", MESSAGE_LIMIT);
    if (channel >= 0) {
        /* The first one: there is no other yet. */
        if (send_packet(channel, manager->packet, manager->nbytes, fds, count) && errno != EPIPE && errno != ECONNRESET)
            return failed_by("the manager can't be asked");
        nbytes = receive_packet(manager, channel, answer, false);
        if (nbytes < 0 && errno == EMFILE)
            return -1;
        if (nbytes <= 0)
            return failed(ECONNRESET, "no manager answers");
    } else {
        uint64_t life = manager->life;
        for (int refused = 0;; refused++) {
            if (refused > REFUSALS_MAX)
                return failed(ECONNRESET, "the manager closes the connection again and again");
            if (manager->channel < 0 && new_channel(manager, "AddChannel", 0, &manager->channel))
                return -1;
            if (manager->life != life)
                refused = 0;
            life = manager->life;
            bool sent = !send_packet(manager->channel, manager->packet, manager->nbytes, fds, count);
            nbytes = sent || errno == EPIPE || errno == ECONNRESET
                         ? receive_packet(manager, manager->channel, answer, false)
                         : -1;
            if (nbytes > 0)
                break;
            if (nbytes < 0 && errno == EMFILE)
                return -1;
            let_go(&manager->channel);
        }
    }
    size_t length = (size_t)nbytes;
    *in = (reader){answer, answer + length, false};
    value items = want(in, ARRAY), name = next(in);
    int *last = manager->arrived + DESCRIPTORS_MAX - 1;
    while (last > manager->arrived && *last < 0)
        last--;
    if (is(name, "Elsewhere") && *last >= 0) {
        /* A reply that is larger than a packet is in a file. */
        int file = *last;
        struct stat status;
        free(manager->large);
        manager->large = NULL;
        if (!fstat(file, &status) && (manager->large = malloc((size_t)status.st_size + 1)))
            length = (size_t)pread(file, manager->large, (size_t)status.st_size, 0);
        let_go(last);
        if (!manager->large || (ssize_t)length < 0)
            return failed(ENOMEM, "there is no memory for the manager's reply");
        *in = (reader){manager->large, manager->large + length, false};
        items = want(in, ARRAY);
        name = next(in);
    }
    if (is(name, reply) && !in->wrong)
        return (int)items.number;
    let_go_of_arrived(manager);
    if (is(name, "Failed")) {
        value kind = next(in), number = next(in), text = next(in);
        int why = is(kind, "PoisonError") ? HWPOISON_EHWPOISON
                  : number.number         ? (int)number.number
                  : is(kind, "FileNotFoundError")  ? ENOENT
                  : is(kind, "FileExistsError")    ? EEXIST
                  : is(kind, "PermissionError")    ? EACCES
                  : is(kind, "MemoryError")        ? ENOMEM
                                                   : EINVAL;
        return failed(why, "%.*s", (int)(text.kind == TEXT ? text.number : 0), text.text ? text.text : "");
    }
    return failed(EPROTO, "the manager answers with something else than %s", reply);
}

static int request(hwpoison_manager *manager, const char *reply, reader *in) {
    int answered = ask(manager, -1, reply, in, NULL, 0);
    let_go_of_arrived(manager);
    return answered;
}

/* A request of which only one number is wanted. Locks. */
static int64_t request_number(hwpoison_manager *manager, const char *reply) {
    reader in;
    if (request(manager, reply, &in) < 0)
        return -1;
    int64_t number = (int64_t)want(&in, NUMBER).number;
    return in.wrong ? failed(EPROTO, "the manager's %s is none", reply) : number;
}

/* --- userfaultfd */

static int open_userfaultfd(bool *user_mode) {
    int flags = O_CLOEXEC | O_NONBLOCK, device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    *user_mode = false;
    if (device >= 0) {
        int fd = ioctl(device, UFFD_IOC_NEW, flags);
        close(device);
        if (fd >= 0)
            return fd;
    }
    int fd = (int)syscall(SYS_userfaultfd, flags);
    if (fd < 0 && errno == EPERM) {
        *user_mode = true;
        fd = (int)syscall(SYS_userfaultfd, flags | UFFD_USER_MODE_ONLY_FLAG);
    }
    return fd;
}

/* The handshake, with what this kernel has of what is wanted. `device`: /dev/userfaultfd, if the manager has passed it. With the
 * lock that forks wait for. */
static int agree(int fd, int device) {
    bool user_mode;
    int other = device >= 0 ? ioctl(device, UFFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK) : open_userfaultfd(&user_mode);
    struct uffd_api asked = {UFFD_API_NUMBER, 0, 0};
    if (other < 0 || ioctl(other, UFFD_IOC_API, &asked)) {
        close_fd(&other);
        return failed_by("userfaultfd can't be used; see `hwpoison doctor`");
    }
    close(other);
    if ((asked.features & UFFD_NEEDED) != UFFD_NEEDED)
        return failed(EOPNOTSUPP, "this kernel's userfaultfd lacks what is needed: Linux 5.19 or newer has it");
    struct uffd_api wanted = {UFFD_API_NUMBER, asked.features & (UFFD_NEEDED | UFFD_POISON), 0};
    return ioctl(fd, UFFD_IOC_API, &wanted) ? failed_by("userfaultfd can't be used; see `hwpoison doctor`") : 0;
}

/* --- the lifeline: when the manager and its keeper are both gone, nobody could ever wake a thread that sleeps in a fault. The
 * kernel then sends SIGKILL to this process: nothing else ends a thread that sleeps in a system call. */

static void arm(hwpoison_manager *manager, bool on) {
    if (manager->lifeline < 0 || on == manager->armed)
        return;
    fcntl(manager->lifeline, F_SETOWN, getpid());
    fcntl(manager->lifeline, F_SETSIG, SIGKILL);
    fcntl(manager->lifeline, F_SETFL, on ? O_ASYNC : 0);
    manager->armed = on;
}

/* --- in a forked child: the mappings are not there (MADV_DONTFORK), and the parent's channels must not stay open. */

static pthread_once_t once = PTHREAD_ONCE_INIT;

static void close_all(hwpoison_manager *manager) {
    close_fd(&manager->control);
    close_fd(&manager->coming);
    for (int i = 0; i < DESCRIPTORS_MAX; i++)
        close_fd(&manager->arrived[i]);
    close_fd(&manager->channel);
    close_fd(&manager->userfaultfd);
    close_fd(&manager->lifeline);
    close_fd(&manager->other);
    close_fd(&manager->notices);
    close_fd(&manager->listening);
    close_fd(&manager->standing_event);
}

static void before_fork(void) { pthread_mutex_lock(&managers_lock); }

static void in_parent(void) { pthread_mutex_unlock(&managers_lock); }

static void in_child(void) {
    for (hwpoison_manager *one = managers; one; one = one->next) {
        close_all(one);
        for (hwpoison_memory *memory = one->memories; memory; memory = memory->next)
            close_fd(&memory->fd);
    }
    managers = NULL;
    pthread_mutex_unlock(&managers_lock);
}

static void begin_to_watch_forks(void) { pthread_atfork(before_fork, in_parent, in_child); }

/* --- connecting */

/* Connects the first channel. A child that is forked meanwhile closes it. */
static int call(hwpoison_manager *manager, const char *name) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t length = strlen(name);
    if (length >= sizeof address.sun_path)
        return failed(ENAMETOOLONG, "a socket's path has at most %zu bytes", sizeof address.sun_path - 1);
    memcpy(address.sun_path, name, length);
    socklen_t nbytes = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length + 1);
    if (*name == '@') {
        address.sun_path[0] = 0;
        nbytes--;
    }
    pthread_mutex_lock(&managers_lock);
    manager->control = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    pthread_mutex_unlock(&managers_lock);
    if (manager->control < 0)
        return failed_by("no socket");
    /* Without the lock: a manager that is stopped lets wait. */
    if (connect(manager->control, (struct sockaddr *)&address, nbytes)) {
        int number = errno;
        let_go(&manager->control);
        return failed(number, "no manager answers at %s: %s", name, strerror(number));
    }
    return 0;
}

/* Have a userfaultfd without limits from the manager, if it gives them to this user: the device is in `arrived` then. */
static void ask_for_device(hwpoison_manager *manager) {
    reader in;
    begin(manager, "Device", 0);
    if (ask(manager, manager->control, "Done", &in, NULL, 0) < 0 || manager->arrived[0] < 0)
        return;
    pthread_mutex_lock(&managers_lock);
    int full = ioctl(manager->arrived[0], UFFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    if (full >= 0) {
        close_fd(&manager->userfaultfd);
        manager->userfaultfd = full;
        manager->user_mode = false;
    } else
        close_fd(&manager->arrived[0]);
    pthread_mutex_unlock(&managers_lock);
}

static int say_hello(hwpoison_manager *manager) {
    int pair[2];
    reader in;
    pthread_mutex_lock(&managers_lock);
    int opened = manager->userfaultfd = open_userfaultfd(&manager->user_mode), why = errno;
    pthread_mutex_unlock(&managers_lock);
    /* Also where a seccomp filter forbids the system call: what the manager passes needs none. */
    if (opened < 0 || manager->user_mode)
        ask_for_device(manager);
    if (manager->userfaultfd < 0) {
        if (errno == ECONNRESET && why == EPERM)
            return -1;
        errno = why;
        return failed_by("userfaultfd can't be opened; see `hwpoison doctor`");
    }
    pthread_mutex_lock(&managers_lock);
    int refused = agree(manager->userfaultfd, manager->arrived[0]);
    pthread_mutex_unlock(&managers_lock);
    if (refused)
        return -1;
    pthread_mutex_lock(&managers_lock);
    bool none = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair);
    if (!none) {
        manager->lifeline = pair[0];
        manager->other = pair[1];
    }
    pthread_mutex_unlock(&managers_lock);
    if (none)
        return failed_by("no lifeline");
    int fds[] = {manager->userfaultfd, manager->other};
    begin(manager, "Hello", 1);
    put_number(manager, VERSION);
    int fields = ask(manager, manager->control, "Welcome", &in, fds, 2);
    let_go(&manager->other);
    if (fields < 0)
        return -1;
    skip(&in);
    manager->page_size = want(&in, NUMBER).number;
    struct stat status;
    bool sensible = manager->page_size >= 4096 && !(manager->page_size & (manager->page_size - 1));
    if (in.wrong || !sensible || manager->arrived[0] < 0 || fstat(manager->arrived[0], &status)) {
        let_go_of_arrived(manager);
        return failed(EPROTO, "the manager's welcome is none");
    }
    manager->board_nbytes = (size_t)status.st_size;
    void *board = mmap(NULL, manager->board_nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, manager->arrived[0], 0);
    let_go_of_arrived(manager);
    if (board == MAP_FAILED)
        return failed_by("the board of guarded views can't be mapped");
    manager->board = board;
    return 0;
}

/* In one step, for whoever forks: known and open, or neither. */
static void forget(hwpoison_manager *manager) {
    pthread_mutex_lock(&managers_lock);
    close_all(manager);
    for (hwpoison_manager **one = &managers; *one; one = &(*one)->next)
        if (*one == manager) {
            *one = manager->next;
            break;
        }
    pthread_mutex_unlock(&managers_lock);
}

hwpoison_manager *hwpoison_connect(const char *socket) {
    const char *name = socket ? socket : getenv("HWPOISON_SOCKET");
    if (!name || !*name) {
        failed(EINVAL, "no manager is named: pass its socket, or set HWPOISON_SOCKET");
        return NULL;
    }
    pthread_once(&once, begin_to_watch_forks);
    hwpoison_manager *manager = calloc(1, sizeof *manager);
    if (!manager || !(manager->packet = malloc(3 * MESSAGE_LIMIT))) {
        free(manager);
        failed(ENOMEM, "there is no memory for a connection");
        return NULL;
    }
    manager->told = manager->packet + 2 * MESSAGE_LIMIT;
    manager->control = manager->channel = manager->coming = manager->userfaultfd = manager->lifeline = manager->other = -1;
    manager->notices = manager->listening = manager->standing_event = -1;
    for (int i = 0; i < DESCRIPTORS_MAX; i++)
        manager->arrived[i] = -1;
    pthread_mutex_init(&manager->lock, NULL);
    pthread_mutex_init(&manager->memories_lock, NULL);
    pthread_mutex_init(&manager->notices_lock, NULL);
    /* Known before it has anything: a child that is forked meanwhile closes it. */
    pthread_mutex_lock(&managers_lock);
    manager->next = managers;
    managers = manager;
    pthread_mutex_unlock(&managers_lock);
    for (int attempt = 1;; attempt++) {
        if (call(manager, name))
            break;
        if (!say_hello(manager))
            return manager;
        /* A manager may die with a client that it has just accepted; so many in a row do not. */
        if (errno != ECONNRESET || attempt == CONNECT_ATTEMPTS)
            break;
        pthread_mutex_lock(&managers_lock);
        close_all(manager);
        pthread_mutex_unlock(&managers_lock);
    }
    int number = errno;
    forget(manager);
    free(manager->large);
    free(manager->packet);
    free(manager);
    errno = number;
    return NULL;
}

void hwpoison_disconnect(hwpoison_manager *manager) {
    reader in;
    while (manager->memories)
        hwpoison_close(manager->memories);
    pthread_mutex_lock(&manager->lock);
    begin(manager, "Goodbye", 0);
    request(manager, "Done", &in);
    pthread_mutex_unlock(&manager->lock);
    forget(manager);
    if (manager->board)
        munmap(manager->board, manager->board_nbytes);
    free(manager->standing);
    free(manager->large);
    free(manager->packet);
    free(manager);
}

int hwpoison_user_mode(const hwpoison_manager *manager) { return manager->user_mode; }

/* --- memory */

/* Far from where the kernel puts what is mapped later: in a forked child there is nothing at our addresses, and nothing else
 * must come there by itself. */
static void *map_apart(size_t nbytes, int protection, int flags, int fd) {
    uintptr_t usual = (uintptr_t)&nbytes, lowest = usual / 4;
    for (int attempt = 0; attempt < PLACES_MAX && nbytes < lowest / 2; attempt++) {
        uint64_t chance;
        if (getrandom(&chance, sizeof chance, GRND_NONBLOCK) != sizeof chance)
            break;
        uintptr_t place = (lowest + chance % (lowest - nbytes)) / PLACE_ALIGNMENT * PLACE_ALIGNMENT;
        void *address = mmap((void *)place, nbytes, protection, flags, fd, 0);
        if (address == MAP_FAILED || address == (void *)place)
            return address;
        /* Something is there. */
        munmap(address, nbytes);
    }
    return mmap(NULL, nbytes, protection, flags, fd, 0);
}

/* Mapped, registered, and only then made known. With the lock held. */
static int map(hwpoison_memory *memory, struct mapping *mapping, bool guarded) {
    hwpoison_manager *manager = memory->manager;
    size_t nbytes = (memory->nbytes + manager->page_size - 1) / manager->page_size * manager->page_size;
    bool shared = memory->writable && !guarded, protect = memory->protect && !guarded;
    int protection = shared ? PROT_READ | PROT_WRITE : PROT_READ;
    void *address = map_apart(nbytes, protection, shared ? MAP_SHARED : MAP_PRIVATE, memory->fd);
    if (address == MAP_FAILED)
        return failed_by("the memory can't be mapped");
    struct uffd_register registered = {(uintptr_t)address, nbytes, protect ? 3 : 1, 0};
    struct uffd_writeprotect watched = {(uintptr_t)address, nbytes, 1};
    reader in;
    madvise(address, nbytes, MADV_DONTFORK);
    madvise(address, nbytes, MADV_NOHUGEPAGE);
    if (ioctl(manager->userfaultfd, UFFD_IOC_REGISTER, &registered) ||
        (protect && ioctl(manager->userfaultfd, UFFD_IOC_WRITEPROTECT, &watched))) {
        failed_by("the memory can't be registered");
        munmap(address, nbytes);
        return -1;
    }
    begin(manager, "Map", 4);
    put_number(manager, memory->object);
    put_number(manager, (uintptr_t)address);
    put_number(manager, mapping->number);
    put_truth(manager, guarded);
    arm(manager, true);
    int answered = request(manager, "Mapped", &in);
    if (answered >= 0) {
        mapping->slot = (int64_t)want(&in, NUMBER).number;
        mapping->errors = want(&in, NUMBER).number;
        int64_t slots = (int64_t)(manager->board_nbytes / (2 * sizeof *manager->board));
        if (in.wrong || (guarded && (mapping->slot < 0 || mapping->slot >= slots)))
            answered = failed(EPROTO, "the manager's answer to Map is none");
    }
    if (answered < 0) {
        int number = errno;
        munmap(address, nbytes);
        errno = number;
        return -1;
    }
    mapping->address = address;
    mapping->nbytes = nbytes;
    return 0;
}

/* Say that a mapping is gone. With the lock held. */
static void say_unmapped(hwpoison_manager *manager, struct mapping *mapping) {
    reader in;
    int number = errno;
    char said[sizeof message];
    memcpy(said, message, sizeof said);
    begin(manager, "Unmap", 1);
    put_number(manager, mapping->number);
    request(manager, "Done", &in);
    memcpy(message, said, sizeof said);
    errno = number;
}

/* It is in the list no more, nor open. Nothing of it is mapped; if nothing else is, nobody is to end us. With the lock held. */
static void forget_memory(hwpoison_memory *memory) {
    hwpoison_manager *manager = memory->manager;
    let_go(&memory->fd);
    pthread_mutex_lock(&manager->memories_lock);
    for (hwpoison_memory **one = &manager->memories; *one; one = &(*one)->next)
        if (*one == memory) {
            *one = memory->next;
            break;
        }
    pthread_mutex_unlock(&manager->memories_lock);
    if (!manager->memories)
        arm(manager, false);
}

/* The object that what is in the packet asks for. With the lock held. */
static hwpoison_memory *found(hwpoison_manager *manager, uint64_t number) {
    reader in;
    if (ask(manager, -1, "Found", &in, NULL, 0) < 0) {
        /* It may be there, and its descriptor could not be taken. */
        struct mapping never = {.number = number};
        say_unmapped(manager, &never);
        return NULL;
    }
    value object = want(&in, NUMBER), name = want(&in, TEXT), nbytes = want(&in, NUMBER);
    skip(&in);
    value writable = want(&in, TRUTH), protect = want(&in, TRUTH);
    hwpoison_memory *memory = in.wrong || manager->arrived[0] < 0 ? NULL : calloc(1, sizeof *memory);
    if (memory)
        memory->name = strndup(name.text, name.number);
    if (!memory || !memory->name) {
        let_go_of_arrived(manager);
        free(memory);
        failed(ENOMEM, "there is no memory for an object, or the manager's answer is none");
        return NULL;
    }
    memory->manager = manager;
    memory->object = object.number;
    memory->nbytes = nbytes.number;
    memory->writable = writable.number;
    memory->protect = protect.number;
    memory->fd = -1;
    memory->plain.number = number;
    pthread_mutex_init(&memory->lock, NULL);
    /* In the list first: a child that is forked finds its descriptor there. */
    pthread_mutex_lock(&manager->memories_lock);
    memory->next = manager->memories;
    manager->memories = memory;
    pthread_mutex_unlock(&manager->memories_lock);
    move_fd(&manager->arrived[0], &memory->fd);
    if (map(memory, &memory->plain, false)) {
        forget_memory(memory);
        say_unmapped(manager, &memory->plain);
        free(memory->name);
        free(memory);
        return NULL;
    }
    return memory;
}

hwpoison_memory *hwpoison_attach(hwpoison_manager *manager, const char *name) {
    pthread_mutex_lock(&manager->lock);
    uint64_t number = ++manager->numbers;
    begin(manager, "Attach", 3);
    put_text(manager, name);
    put_nothing(manager);
    put_number(manager, number);
    hwpoison_memory *memory = found(manager, number);
    pthread_mutex_unlock(&manager->lock);
    return memory;
}

hwpoison_memory *hwpoison_allocate(hwpoison_manager *manager, uint64_t nbytes, const char *name) {
    pthread_mutex_lock(&manager->lock);
    uint64_t number = ++manager->numbers;
    begin(manager, "Allocate", 4);
    put_number(manager, nbytes);
    put_text(manager, name);
    put_number(manager, number);
    put_truth(manager, false);
    hwpoison_memory *memory = found(manager, number);
    pthread_mutex_unlock(&manager->lock);
    /* In user mode a system call can't use pages that are not there. */
    if (memory && manager->user_mode && hwpoison_prefetch(memory, 0, memory->nbytes)) {
        int why = errno;
        hwpoison_close(memory);
        errno = why;
        return NULL;
    }
    return memory;
}

void *hwpoison_address(const hwpoison_memory *memory) { return memory->plain.address; }

uint64_t hwpoison_nbytes(const hwpoison_memory *memory) { return memory->nbytes; }

const char *hwpoison_name(const hwpoison_memory *memory) { return memory->name; }

int hwpoison_writable(const hwpoison_memory *memory) { return memory->writable; }

void hwpoison_close(hwpoison_memory *memory) {
    hwpoison_manager *manager = memory->manager;
    pthread_mutex_lock(&manager->lock);
    if (memory->view.address)
        munmap(memory->view.address, memory->view.nbytes);
    munmap(memory->plain.address, memory->plain.nbytes);
    /* Before it is said: a manager that only waits for this ends when it hears it, and what is armed would end us. */
    forget_memory(memory);
    if (memory->view.address)
        say_unmapped(manager, &memory->view);
    say_unmapped(manager, &memory->plain);
    pthread_mutex_unlock(&manager->lock);
    free(memory->name);
    free(memory);
}

/* Begin a request about a range of the memory; it has `fields` beside the mapping, of which the range are two. Locks. */
static void begin_range(hwpoison_memory *memory, const char *name, unsigned fields, uint64_t offset, uint64_t nbytes) {
    pthread_mutex_lock(&memory->manager->lock);
    begin(memory->manager, name, fields + 1);
    put_number(memory->manager, memory->plain.number);
    put_number(memory->manager, offset);
    put_number(memory->manager, nbytes);
}

static int64_t ended(hwpoison_memory *memory, int64_t result) {
    int number = errno;
    pthread_mutex_unlock(&memory->manager->lock);
    errno = number;
    return result;
}

int hwpoison_prefetch(hwpoison_memory *memory, uint64_t offset, uint64_t nbytes) {
    reader in;
    begin_range(memory, "Prefetch", 2, offset, nbytes);
    return (int)ended(memory, request(memory->manager, "Done", &in) < 0 ? -1 : 0);
}

int64_t hwpoison_resident(hwpoison_memory *memory, uint64_t offset, uint64_t nbytes, int write) {
    hwpoison_manager *manager = memory->manager;
    reader in;
    int64_t number = (int64_t)++memory->residence;
    pthread_mutex_lock(&manager->lock);
    begin(manager, "Resident", 5);
    put_number(manager, memory->plain.number);
    put_number(manager, (uint64_t)number);
    put_number(manager, offset);
    put_number(manager, nbytes);
    put_truth(manager, write);
    return ended(memory, request(manager, "Done", &in) < 0 ? -1 : number);
}

int hwpoison_resident_over(hwpoison_memory *memory, int64_t number) {
    hwpoison_manager *manager = memory->manager;
    reader in;
    pthread_mutex_lock(&manager->lock);
    begin(manager, "ResidentOver", 2);
    put_number(manager, memory->plain.number);
    put_number(manager, (uint64_t)number);
    return (int)ended(memory, request(manager, "Done", &in) < 0 ? -1 : 0);
}

int hwpoison_flush(hwpoison_memory *memory) {
    hwpoison_manager *manager = memory->manager;
    reader in;
    int64_t result = -1;
    pthread_mutex_lock(&manager->lock);
    begin(manager, "Flush", 2);
    put_number(manager, memory->plain.number);
    put_number(manager, memory->plain.errors);
    if (request(manager, "Flushed", &in) >= 0) {
        memory->plain.errors = want(&in, NUMBER).number;
        value error = next(&in);
        result = in.wrong ? failed(EPROTO, "the manager's answer to Flush is none") : 0;
        if (!in.wrong && error.kind == ARRAY) {
            skip(&in);
            skip(&in);
            value number = next(&in), text = next(&in);
            result = failed(number.number ? (int)number.number : EIO, "%.*s", (int)text.number, text.text ? text.text : "");
        }
    }
    return (int)ended(memory, result);
}

/* --- losses */

/* ["Ranges", [[offset, nbytes], ...], count]: how many; up to `room` are stored. */
static int64_t read_ranges(reader *in, hwpoison_range *ranges, size_t room, uint64_t *count) {
    uint64_t found = want(in, ARRAY).number;
    for (uint64_t i = 0; i < found && !in->wrong; i++) {
        want(in, ARRAY);
        hwpoison_range one = {.offset = want(in, NUMBER).number};
        one.nbytes = want(in, NUMBER).number;
        if (i < room)
            ranges[i] = one;
    }
    if (count)
        *count = want(in, NUMBER).number;
    return in->wrong ? failed(EPROTO, "the manager's ranges are none") : (int64_t)found;
}

int64_t hwpoison_lost(hwpoison_memory *memory, hwpoison_range *ranges, size_t count) {
    hwpoison_manager *manager = memory->manager;
    reader in;
    pthread_mutex_lock(&manager->lock);
    begin(manager, "Lost", 1);
    put_number(manager, memory->plain.number);
    return ended(memory, request(manager, "Ranges", &in) < 0 ? -1 : read_ranges(&in, ranges, count, NULL));
}

int64_t hwpoison_repair(hwpoison_memory *memory, uint64_t offset, const void *data, uint64_t nbytes) {
    hwpoison_manager *manager = memory->manager;
    uint64_t end = offset + nbytes, repaired = 0;
    if (end < offset || end > memory->nbytes || offset % manager->page_size ||
        (end % manager->page_size && end != memory->nbytes))
        /* The manager says so too, but it gets the data in pieces: none must be repaired before the last is refused. */
        return failed(EINVAL, "repair needs whole pages of %zu bytes within %s", manager->page_size, memory->name);
    for (uint64_t done = 0; done < nbytes; done += DATA_LIMIT) {
        size_t piece = nbytes - done < DATA_LIMIT ? nbytes - done : DATA_LIMIT;
        pthread_mutex_lock(&manager->lock);
        begin(manager, "Repair", 3);
        put_number(manager, memory->plain.number);
        put_number(manager, offset + done);
        put_bytes(manager, (const char *)data + done, piece);
        int64_t one = ended(memory, request_number(manager, "Count"));
        if (one < 0)
            return -1;
        repaired += (uint64_t)one;
    }
    return (int64_t)repaired;
}

int64_t hwpoison_discard(hwpoison_memory *memory, uint64_t offset, uint64_t nbytes) {
    begin_range(memory, "Discard", 2, offset, nbytes);
    return ended(memory, request_number(memory->manager, "Count"));
}

/* --- notices */

static int listen_again(hwpoison_manager *manager) {
    pthread_mutex_lock(&manager->lock);
    int result = new_channel(manager, "Listen", manager->last, &manager->listening);
    pthread_mutex_unlock(&manager->lock);
    struct epoll_event event = {.events = EPOLLIN};
    if (!result && epoll_ctl(manager->notices, EPOLL_CTL_ADD, manager->listening, &event)) {
        result = failed_by("notices can't be waited for");
        let_go(&manager->listening);
    }
    return result;
}

/* What stands now, kept until it is asked for. */
static int remember_standing(hwpoison_manager *manager) {
    reader in;
    int result = -1;
    pthread_mutex_lock(&manager->lock);
    begin(manager, "Standing", 1);
    put_number(manager, 0);
    if (request(manager, "Losses", &in) >= 0) {
        manager->last = want(&in, NUMBER).number;
        manager->standing_left = want(&in, ARRAY).number;
        manager->standing_end = (size_t)(in.end - in.at);
        manager->standing = malloc(manager->standing_end + 1);
        result = in.wrong || !manager->standing ? failed(ENOMEM, "there is no memory for what is lost") : 0;
        if (!result)
            memcpy(manager->standing, in.at, manager->standing_end);
    }
    pthread_mutex_unlock(&manager->lock);
    return result;
}

int hwpoison_notices(hwpoison_manager *manager) {
    pthread_mutex_lock(&manager->notices_lock);
    if (manager->notices < 0) {
        struct epoll_event event = {.events = EPOLLIN};
        manager->notices = epoll_create1(EPOLL_CLOEXEC);
        manager->standing_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (manager->notices < 0 || manager->standing_event < 0 ||
            epoll_ctl(manager->notices, EPOLL_CTL_ADD, manager->standing_event, &event))
            failed_by("notices can't be waited for");
        /* Listening first: what is lost between the two is told twice, and known by its number. */
        else if (!listen_again(manager) && !remember_standing(manager)) {
            if (manager->standing_left)
                eventfd_write(manager->standing_event, 1);
            pthread_mutex_unlock(&manager->notices_lock);
            return manager->notices;
        }
        int number = errno;
        let_go(&manager->notices);
        let_go(&manager->listening);
        let_go(&manager->standing_event);
        errno = number;
    }
    int fd = manager->notices;
    pthread_mutex_unlock(&manager->notices_lock);
    return fd;
}

/* ["Told", number, object, {...}]: its number. */
static uint64_t read_told(hwpoison_manager *manager, reader *in, hwpoison_notice *notice) {
    memset(notice, 0, sizeof *notice);
    want(in, ARRAY);
    if (!is(next(in), "Told"))
        in->wrong = true;
    uint64_t number = want(in, NUMBER).number, object = want(in, NUMBER).number, fields = want(in, MAP).number;
    for (uint64_t i = 0; i < fields && !in->wrong; i++) {
        value name = next(in), found = next(in);
        if (is(name, "name"))
            copy_text(found, notice->name, sizeof notice->name);
        else if (is(name, "state"))
            copy_text(found, notice->state, sizeof notice->state);
        else if (is(name, "outcome"))
            copy_text(found, notice->outcome, sizeof notice->outcome);
        else if (is(name, "source"))
            copy_text(found, notice->source, sizeof notice->source);
        else if (is(name, "event_id"))
            copy_text(found, notice->event_id, sizeof notice->event_id);
        else if (is(name, "reason"))
            copy_text(found, notice->reason, sizeof notice->reason);
        else if (is(name, "offset"))
            notice->offset = found.number;
        else if (is(name, "nbytes"))
            notice->nbytes = found.number;
        else if (is(name, "time"))
            notice->time = found.kind == REAL ? found.real : (double)found.number;
    }
    pthread_mutex_lock(&manager->memories_lock);
    for (hwpoison_memory *one = manager->memories; one && !notice->memory; one = one->next)
        if (one->object == object)
            notice->memory = one;
    pthread_mutex_unlock(&manager->memories_lock);
    return number;
}

int hwpoison_next_notice(hwpoison_manager *manager, hwpoison_notice *notice) {
    uint8_t *bytes = manager->told;
    int result = -1;
    pthread_mutex_lock(&manager->notices_lock);
    if (manager->notices < 0)
        failed(EINVAL, "nobody listens: hwpoison_notices() comes first");
    else if (manager->standing_left) {
        reader in = {manager->standing + manager->standing_at, manager->standing + manager->standing_end, false};
        read_told(manager, &in, notice);
        manager->standing_at = (size_t)(in.at - manager->standing);
        if (!--manager->standing_left || in.wrong) {
            eventfd_t ignored;
            manager->standing_left = 0;
            eventfd_read(manager->standing_event, &ignored);
        }
        result = in.wrong ? failed(EPROTO, "the manager's notice is none") : 1;
    } else
        for (;;) {
            ssize_t nbytes = recv(manager->listening, bytes, MESSAGE_LIMIT, MSG_DONTWAIT);
            if (nbytes < 0 && (errno == EAGAIN || errno == EINTR)) {
                result = 0;
                break;
            }
            if (nbytes <= 0) {
                /* The manager has died: the next one goes on where it was. */
                if (listen_again(manager))
                    break;
                continue;
            }
            reader in = {bytes, bytes + nbytes, false};
            uint64_t number = read_told(manager, &in, notice);
            if (in.wrong) {
                failed(EPROTO, "the manager's notice is none");
                break;
            }
            if (number > manager->last) {
                manager->last = number;
                result = 1;
                break;
            }
        }
    pthread_mutex_unlock(&manager->notices_lock);
    return result;
}

/* --- guards: for each guarded view there are two words on the board. In one the manager counts losses that were met, in the
 * other stands how many guards are open. It counts a loss, then looks whether a guard is open; a guard that ends says so,
 * then looks at the count: at least one of the two sees the other. */

static atomic_uint_least64_t *met_word(hwpoison_memory *memory) { return memory->manager->board + 2 * memory->view.slot; }

static atomic_uint_least64_t *open_word(hwpoison_memory *memory) { return met_word(memory) + 1; }

/* What was met since `seen`, and the count now; its zeros are gone afterwards. With the memory's lock held. */
static int64_t settle(hwpoison_memory *memory, uint64_t seen, hwpoison_range *ranges, size_t room, uint64_t *count) {
    hwpoison_manager *manager = memory->manager;
    uint64_t forget = memory->clean;
    reader in;
    for (hwpoison_guard *one = memory->guards; one; one = one->next)
        if (one->seen < forget)
            forget = one->seen;
    pthread_mutex_lock(&manager->lock);
    begin(manager, "Met", 3);
    put_number(manager, memory->view.number);
    put_number(manager, seen);
    put_number(manager, forget);
    int64_t met = request(manager, "Ranges", &in) < 0 ? -1 : 0;
    if (!met) {
        reader again = in;
        met = read_ranges(&in, ranges, room, count);
        for (int64_t left = (int64_t)want(&again, ARRAY).number; met >= 0 && left > 0; left--) {
            want(&again, ARRAY);
            uint64_t offset = want(&again, NUMBER).number, nbytes = want(&again, NUMBER).number;
            if (offset > memory->nbytes || nbytes > memory->nbytes - offset) {
                met = failed(EPROTO, "the manager tells of losses that are not in the memory");
                break;
            }
            madvise((char *)memory->view.address + offset, nbytes, MADV_DONTNEED);
        }
        if (met >= 0 && *count > memory->clean)
            memory->clean = *count;
    }
    return ended(memory, met);
}

hwpoison_guard *hwpoison_guard_open(hwpoison_memory *memory, const void **view) {
    hwpoison_guard *guard = calloc(1, sizeof *guard);
    bool opened = false;
    if (!guard) {
        failed(ENOMEM, "there is no memory for a guard");
        return NULL;
    }
    pthread_mutex_lock(&memory->lock);
    if (!memory->view.address) {
        pthread_mutex_lock(&memory->manager->lock);
        memory->view.number = ++memory->manager->numbers;
        if (map(memory, &memory->view, true))
            say_unmapped(memory->manager, &memory->view);
        ended(memory, 0);
    }
    if (memory->view.address) {
        guard->memory = memory;
        guard->seen = memory->clean;
        guard->next = memory->guards;
        memory->guards = guard;
        atomic_store(open_word(memory), ++memory->open);
        /* What others have met must not meet this one. */
        opened = atomic_load(met_word(memory)) == memory->clean ||
                 settle(memory, memory->clean, NULL, 0, &guard->seen) >= 0;
        if (!opened) {
            memory->guards = guard->next;
            atomic_store(open_word(memory), --memory->open);
        }
    }
    if (!opened) {
        int number = errno;
        free(guard);
        guard = NULL;
        errno = number;
    } else
        *view = memory->view.address;
    pthread_mutex_unlock(&memory->lock);
    return guard;
}

/* With the memory's lock held. */
static int64_t met(hwpoison_guard *guard, hwpoison_range *ranges, size_t count) {
    hwpoison_memory *memory = guard->memory;
    return atomic_load(met_word(memory)) == guard->seen ? 0 : settle(memory, guard->seen, ranges, count, &guard->seen);
}

int64_t hwpoison_guard_check(hwpoison_guard *guard, hwpoison_range *ranges, size_t count) {
    hwpoison_memory *memory = guard->memory;
    pthread_mutex_lock(&memory->lock);
    int64_t result = met(guard, ranges, count);
    pthread_mutex_unlock(&memory->lock);
    return result;
}

int64_t hwpoison_guard_close(hwpoison_guard *guard, hwpoison_range *ranges, size_t count) {
    hwpoison_memory *memory = guard->memory;
    pthread_mutex_lock(&memory->lock);
    atomic_store(open_word(memory), --memory->open);
    int64_t result = met(guard, ranges, count);
    for (hwpoison_guard **one = &memory->guards; *one; one = &(*one)->next)
        if (*one == guard) {
            *one = guard->next;
            break;
        }
    pthread_mutex_unlock(&memory->lock);
    free(guard);
    return result;
}
