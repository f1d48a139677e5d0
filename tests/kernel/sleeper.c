/* A thread that sleeps in a poll with known values in every register, and says what became of them.
 * Usage: sleeper ppoll|poll|epoll_wait; prints its function, ends at the first byte on standard input. */
#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

struct state {
    uint64_t general[11]; /* rbx rbp r12 r13 r14 r15 rdi rsi rdx r8 r9 */
    uint64_t fourth;      /* r10 */
    uint64_t number;      /* rax */
    uint8_t vectors[16][32];
    uint32_t mxcsr;
    uint16_t x87;
};

static volatile uint64_t calls, wrong_stack, usr1;

/* What a debugger or aio-trace has this thread call: it spoils whatever a function may spoil. */
__attribute__((noinline)) void called(volatile uint64_t *counter)
{
    uint32_t other = 0x1f80;
    if ((uintptr_t)__builtin_frame_address(0) % 16) {
        wrong_stack++;
    }
    __asm__ volatile("vpxor %%ymm0, %%ymm0, %%ymm0\n vpxor %%ymm9, %%ymm9, %%ymm9\n ldmxcsr %0\n fninit\n"
                     "mov $-1, %%r8\n mov $-1, %%r9\n mov $-1, %%r10\n mov $-1, %%rdx\n mov $-1, %%rsi\n"
                     ::"m"(other) : "r8", "r9", "r10", "rdx", "rsi", "xmm0", "xmm9", "memory");
    (*counter)++;
}

/* The system call with all of `before` in the registers; what is in them after it. */
void sleep_with(const struct state *before, struct state *after);
__asm__(
    ".text\n.globl sleep_with\nsleep_with:\n"
    "push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n push %rsi\n"
    "mov %rdi, %rax\n"
    "ldmxcsr 616(%rax)\n fldcw 620(%rax)\n lea 104(%rax), %rcx\n"
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n vmovdqu (\\n*32)(%rcx), %ymm\\n\n .endr\n"
    "mov (%rax), %rbx\n mov 8(%rax), %rbp\n mov 16(%rax), %r12\n mov 24(%rax), %r13\n mov 32(%rax), %r14\n"
    "mov 40(%rax), %r15\n mov 48(%rax), %rdi\n mov 56(%rax), %rsi\n mov 64(%rax), %rdx\n mov 72(%rax), %r8\n"
    "mov 80(%rax), %r9\n mov 88(%rax), %r10\n mov 96(%rax), %rax\n"
    "movq $0x5ca1ab1e, -128(%rsp)\n"
    "syscall\n"
    "mov (%rsp), %rcx\n"
    "mov %rbx, (%rcx)\n mov %rbp, 8(%rcx)\n mov %r12, 16(%rcx)\n mov %r13, 24(%rcx)\n mov %r14, 32(%rcx)\n"
    "mov %r15, 40(%rcx)\n mov %rdi, 48(%rcx)\n mov %rsi, 56(%rcx)\n mov %rdx, 64(%rcx)\n mov %r8, 72(%rcx)\n"
    "mov %r9, 80(%rcx)\n mov %r10, 88(%rcx)\n mov %rax, 96(%rcx)\n"
    "stmxcsr 616(%rcx)\n fnstcw 620(%rcx)\n"
    "cmpq $0x5ca1ab1e, -128(%rsp)\n je 1f\n movq $0, 88(%rcx)\n1:\n"
    "lea 104(%rcx), %rax\n"
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n vmovdqu %ymm\\n, (\\n*32)(%rax)\n .endr\n"
    "pop %rsi\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n ret\n");

static void on_usr1(int number)
{
    (void)number;
    usr1++;
}

static void spoiled(const char *what)
{
    printf("spoiled: %s\n", what);
    exit(1);
}

static void check(const struct state *before, const struct state *after, const sigset_t *mask, const stack_t *stack)
{
    sigset_t mask_now;
    stack_t stack_now;
    if (memcmp(before->general, after->general, sizeof before->general) || before->fourth != after->fourth) {
        spoiled("a general register, or the red zone");
    }
    if (memcmp(before->vectors, after->vectors, sizeof before->vectors)) {
        spoiled("a vector register");
    }
    if (before->mxcsr != after->mxcsr || before->x87 != after->x87) {
        spoiled("a floating-point control word");
    }
    sigprocmask(SIG_SETMASK, NULL, &mask_now);
    if (memcmp(&mask_now, mask, 8)) {
        spoiled("the signal mask");
    }
    sigaltstack(NULL, &stack_now);
    if (stack_now.ss_sp != stack->ss_sp || stack_now.ss_size != stack->ss_size || stack_now.ss_flags) {
        spoiled("the alternate signal stack");
    }
    if (wrong_stack) {
        spoiled("the alignment of the call's stack");
    }
}

int main(int argc, char **argv)
{
    _Static_assert(__builtin_offsetof(struct state, mxcsr) == 616, "as sleep_with has it");
    static struct state before, after;
    struct pollfd input = {.fd = 0, .events = POLLIN};
    struct epoll_event event = {.events = EPOLLIN};
    int epoll = epoll_create1(0);
    stack_t stack = {.ss_sp = malloc(1 << 16), .ss_size = 1 << 16};
    struct sigaction action = {.sa_handler = on_usr1, .sa_flags = SA_RESTART};
    sigset_t mask;
    uint64_t ended = 0;

    (void)argc;
    sigaction(SIGUSR1, &action, NULL);
    sigaltstack(&stack, NULL);
    sigemptyset(&mask);
    sigaddset(&mask, SIGTRAP);
    sigaddset(&mask, SIGALRM);
    sigprocmask(SIG_SETMASK, &mask, NULL);
    epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &event);
    for (int i = 0; i < 11; i++) {
        before.general[i] = 0x0101010101010101UL * (uint64_t)(i + 1);
    }
    before.fourth = 0;
    for (int i = 0; i < 16; i++) {
        memset(before.vectors[i], 0x40 + i, 32);
    }
    before.mxcsr = 0x3f80; /* round down */
    before.x87 = 0x0e7f;   /* round to zero, single precision */
    before.general[6] = (uintptr_t)&input;
    before.general[7] = 1;
    if (!strcmp(argv[1], "ppoll")) {
        before.number = SYS_ppoll;
        before.general[8] = 0;
    } else if (!strcmp(argv[1], "poll")) {
        before.number = SYS_poll;
        before.general[8] = 3600 * 1000;
    } else {
        before.number = SYS_epoll_wait;
        before.general[6] = epoll;
        before.general[7] = (uintptr_t)&event;
        before.general[8] = 1;
        before.fourth = (uint64_t)-1;
    }
    printf("%p %p\n", (void *)called, (void *)&calls);
    fflush(stdout);
    for (;;) {
        sleep_with(&before, &after);
        check(&before, &after, &mask, &stack);
        if (after.number == 1) {
            break;
        }
        if (after.number != (uint64_t)-4) {
            spoiled("the system call's result");
        }
        ended++;
    }
    printf("calls %lu interrupted %lu usr1 %lu\n", (unsigned long)calls, (unsigned long)ended, (unsigned long)usr1);
    return 0;
}
