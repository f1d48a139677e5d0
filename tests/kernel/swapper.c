/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A process that changes what /proc/PID/exe names, as anybody may in a user namespace of his own:
 * `unshare -Ur swapper FILE...`. For each byte read from standard input, a digit, /proc/PID/exe names that FILE;
 * the same byte is the answer, or '!' where the kernel refused.
 *
 * The kernel asks that nothing of the old executable is mapped any more. So the loop runs in a page of its own.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/prctl.h>

#define MAX_FILES 8
#define MAX_PARTS 16

struct work {
    struct prctl_mm_map map;
    int files[MAX_FILES];
    long parts[MAX_PARTS][2];
    int parts_used;
    char byte;
};

/* No library and no data of the executable from here on. */
__attribute__((always_inline)) static inline long call(long number, long a, long b, long c, long d, long e)
{
    long result;
#ifdef __x86_64__
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
#else
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory");
    result = x0;
#endif
    return result;
}

__attribute__((noinline, noreturn, section(".swapping"))) static void swapping(struct work *work)
{
    for (int i = 0; i < work->parts_used; i++)
        call(SYS_munmap, work->parts[i][0], work->parts[i][1], 0, 0, 0);
    for (;;) {
        if (call(SYS_read, 0, (long)&work->byte, 1, 0, 0) != 1)
            call(SYS_exit_group, 0, 0, 0, 0, 0);
        work->map.exe_fd = work->files[work->byte - '0'];
        if (call(SYS_prctl, PR_SET_MM, PR_SET_MM_MAP, (long)&work->map, sizeof(work->map), 0))
            work->byte = '!';
        call(SYS_write, 1, (long)&work->byte, 1, 0, 0);
    }
}

/* proc(5): the fields of /proc/PID/stat, counted from 1. */
static void read_map(struct prctl_mm_map *map)
{
    char text[4096], *at;
    unsigned long long field[53] = { 0 };
    FILE *file = fopen("/proc/self/stat", "r");

    if (!file || !fgets(text, sizeof(text), file))
        exit(1);
    fclose(file);
    at = strrchr(text, ')') + 2;
    for (int i = 3; i < 53 && at; i++) {
        field[i] = strtoull(at, NULL, 10);
        at = strchr(at, ' ');
        at = at ? at + 1 : NULL;
    }
    *map = (struct prctl_mm_map){
        .start_code = field[26], .end_code = field[27], .start_data = field[45], .end_data = field[46],
        .start_brk = field[47], .brk = (unsigned long)sbrk(0), .start_stack = field[28],
        .arg_start = field[48], .arg_end = field[49], .env_start = field[50], .env_end = field[51],
    };
}

static void read_parts(struct work *work, const char *own)
{
    char line[4096];
    FILE *file = fopen("/proc/self/maps", "r");

    while (file && fgets(line, sizeof(line), file)) {
        long start, end;
        if (strstr(line, own) && sscanf(line, "%lx-%lx", &start, &end) == 2 && work->parts_used < MAX_PARTS) {
            work->parts[work->parts_used][0] = start;
            work->parts[work->parts_used++][1] = end - start;
        }
    }
    if (file)
        fclose(file);
}

int main(int argc, char **argv)
{
    struct work work = { .parts_used = 0 };
    char own[4096] = "";
    void *page = mmap(NULL, 65536, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (argc < 2 || argc > MAX_FILES || page == MAP_FAILED || readlink("/proc/self/exe", own, sizeof(own) - 1) < 0)
        return 1;
    for (int i = 1; i < argc; i++)
        work.files[i - 1] = open(argv[i], O_RDONLY);
    read_map(&work.map);
    read_parts(&work, own);
    memcpy(page, (void *)swapping, 4096);
    __builtin___clear_cache((char *)page, (char *)page + 4096);
    ((void (*)(struct work *))page)(&work);
}
