/* A client of a hwpoison manager, for programs in C and whatever calls C. Nothing of Python is in it.
 *
 * A program connects to a manager, attaches objects, and reads and writes them as memory. Pages that fail are isolated and
 * read again by the manager while an access waits; bytes that are lost are told by notices, and an access to them is a
 * SIGBUS, or within a guard reads as zeros, which the guard tells. What a loss means is in docs/states.md; the messages that
 * go to and fro are in docs/protocol.md.
 *
 * Functions that return a pointer return NULL where they fail, those that return a number -1; errno says why, and
 * hwpoison_error() in a sentence. Those that take a pointer to a manager, memory or guard may be called by several threads;
 * requests of one manager go one after the other. Nothing here may be called in a signal handler. A child after fork() has
 * none of the mappings (an access is a SIGSEGV there, never a zero) and must not use them: it connects anew.
 *
 * Apache-2.0.
 */
#ifndef HWPOISON_H
#define HWPOISON_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The kernel's number for "memory page has hardware error". */
#define HWPOISON_EHWPOISON 133

typedef struct hwpoison_manager hwpoison_manager;
typedef struct hwpoison_memory hwpoison_memory;
typedef struct hwpoison_guard hwpoison_guard;

/* Bytes of an object. */
typedef struct {
    uint64_t offset, nbytes;
} hwpoison_range;

/* A loss. `memory` is one that this program has of the object, NULL if none is left. `time` in seconds since the epoch. Of a
 * longer text, a name for instance, there is as much as there is room for. */
typedef struct {
    hwpoison_memory *memory;
    uint64_t offset, nbytes;
    double time;
    char name[256], state[64], outcome[32], source[64], event_id[64], reason[512];
} hwpoison_notice;

/* What went wrong in this thread's last call that failed. */
const char *hwpoison_error(void);

/* --- the manager */

/* The manager at a socket: a path, or an abstract name that begins with @; NULL: the one that $HWPOISON_SOCKET names. Whoever
 * serves there is trusted with this program's memory, so the socket belongs where nobody else can put another one. */
hwpoison_manager *hwpoison_connect(const char *socket);

/* Memories that are still open are closed. */
void hwpoison_disconnect(hwpoison_manager *manager);

/* 1 if a system call that meets a page which is not present fails with EFAULT instead of waiting, see hwpoison_resident. */
int hwpoison_user_mode(const hwpoison_manager *manager);

/* --- memory */

/* An object that exists, mapped. */
hwpoison_memory *hwpoison_attach(hwpoison_manager *manager, const char *name);

/* New anonymous memory, all zeros; it lives as long as some process has it open. The name must be free, and not empty. In user
 * mode all of it is there at once, so that system calls can use it. */
hwpoison_memory *hwpoison_allocate(hwpoison_manager *manager, uint64_t nbytes, const char *name);

void *hwpoison_address(const hwpoison_memory *memory);
uint64_t hwpoison_nbytes(const hwpoison_memory *memory);
const char *hwpoison_name(const hwpoison_memory *memory);
/* 0 if a store to it is a SIGSEGV. */
int hwpoison_writable(const hwpoison_memory *memory);

/* Unmaps it; no guard of it may be open. */
void hwpoison_close(hwpoison_memory *memory);

/* Bring bytes in, and return when they are there. What can't be had is left for its access; EINVAL outside of the memory. */
int hwpoison_prefetch(hwpoison_memory *memory, uint64_t offset, uint64_t nbytes);

/* Bytes are fit for system calls until hwpoison_resident_over with the number that this returns (more than 0); `write`:
 * calls may store into them. Fails with HWPOISON_EHWPOISON if some of them are lost. */
int64_t hwpoison_resident(hwpoison_memory *memory, uint64_t offset, uint64_t nbytes, int write);
int hwpoison_resident_over(hwpoison_memory *memory, int64_t number);

/* Write changes to the file, and wait until they are on the disk. EIO once for changes that were lost. */
int hwpoison_flush(hwpoison_memory *memory);

/* --- losses */

/* What is lost of it: how many ranges, of which up to `count` are stored. */
int64_t hwpoison_lost(hwpoison_memory *memory, hwpoison_range *ranges, size_t count);

/* Give lost pages their right content, each in one step; others stay as they are. The data covers whole pages, or ends with
 * the object. Returns the bytes repaired. */
int64_t hwpoison_repair(hwpoison_memory *memory, uint64_t offset, const void *data, uint64_t nbytes);

/* Give up lost pages that the range touches: zeros, or what the file holds now. Returns the bytes discarded. */
int64_t hwpoison_discard(hwpoison_memory *memory, uint64_t offset, uint64_t nbytes);

/* From now on losses are told: a descriptor for poll(2) and the like, readable while hwpoison_next_notice has one. The same
 * for all calls; it is closed by hwpoison_disconnect. Those that stand now, of the memories that are open now, come first: of
 * one that is attached later hwpoison_lost says them. This client sends no signals: the policy "early" changes nothing here. */
int hwpoison_notices(hwpoison_manager *manager);

/* The next loss: 1, 0 if there is none now, or -1. Does not wait for one, nor for requests of other threads; if the manager
 * has died, for the next one. */
int hwpoison_next_notice(hwpoison_manager *manager, hwpoison_notice *notice);

/* --- guards */

/* A read-only view of the memory, at *view, in which lost bytes read as zeros until the guard is closed. What was computed
 * from it counts only after a check, or a close, that has told of no loss. */
hwpoison_guard *hwpoison_guard_open(hwpoison_memory *memory, const void **view);

/* How many ranges of lost bytes were met through the view since the guard was opened, or last checked; up to `count` of them
 * are stored. 0: all that was read was right. -1: it can't be known. */
int64_t hwpoison_guard_check(hwpoison_guard *guard, hwpoison_range *ranges, size_t count);

/* The same, and the guard is closed, whatever is returned. */
int64_t hwpoison_guard_close(hwpoison_guard *guard, hwpoison_range *ranges, size_t count);

#ifdef __cplusplus
}
#endif

#endif
