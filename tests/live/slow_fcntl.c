/* Preloaded: a program is not scheduled for a while just before it takes O_ASYNC from a descriptor, at most until the other end
 * is gone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>

static int slow(const char *name, int fd, int command, long argument) {
    int (*real)(int, int, long) = (int (*)(int, int, long))dlsym(RTLD_NEXT, name);
    struct pollfd gone = {fd, 0, 0};
    if (command == F_SETFL && !(argument & O_ASYNC))
        poll(&gone, 1, 1000);
    return real(fd, command, argument);
}

int fcntl(int fd, int command, ...) {
    va_list arguments;
    va_start(arguments, command);
    long argument = va_arg(arguments, long);
    va_end(arguments);
    return slow("fcntl", fd, command, argument);
}

int fcntl64(int fd, int command, ...) {
    va_list arguments;
    va_start(arguments, command);
    long argument = va_arg(arguments, long);
    va_end(arguments);
    return slow("fcntl64", fd, command, argument);
}
