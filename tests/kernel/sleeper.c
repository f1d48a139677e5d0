/* A thread that sleeps in a poll with known values in every register, and says what became of them.
 * Usage: sleeper ppoll|poll|epoll_wait [tiles]; with `tiles` it uses those of AMX where the processor has them. Prints
 * its function, its counter and which states of the processor it fills; ends at the first byte on standard input. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

struct state {
    uint64_t general[11]; /* rbx rbp r12 r13 r14 r15 rdi rsi rdx r8 r9 */
    uint64_t fourth;      /* r10 */
    uint64_t number;      /* rax */
    uint8_t vectors[16][32];
    uint32_t mxcsr;
    uint16_t x87;
};

struct wide {
    uint8_t registers[32][64]; /* zmm0 to zmm31 */
    uint64_t masks[8];         /* k0 to k7 */
};

static volatile uint64_t calls, wrong_stack, usr1;
/* Read by the code below. */
struct wide wide_before, wide_after;
uint8_t has_wide, has_tiles;
static uint8_t tiles_before[8][1024], tiles_after[8][1024];

/* Eight tiles of 16 rows of 64 bytes; the layout is that of ldtilecfg. */
static struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t columns[16];
    uint8_t rows[16];
} tiles = {.palette = 1};

#define EACH_TILE(WHAT) WHAT(0) WHAT(1) WHAT(2) WHAT(3) WHAT(4) WHAT(5) WHAT(6) WHAT(7)
#define LOAD_TILE(N) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #N ::"r"(tiles_before[N]), "r"(64L) : "memory");
#define STORE_TILE(N) __asm__ volatile("tilestored %%tmm" #N ", (%0,%1,1)" ::"r"(tiles_after[N]), "r"(64L) : "memory");

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
    if (has_wide) {
        __asm__ volatile("vpxorq %zmm9, %zmm9, %zmm9\n vpxorq %zmm31, %zmm31, %zmm31\n kxorq %k1, %k1, %k1\n"
                         "kxnorq %k7, %k7, %k7");
    }
    if (has_tiles) {
        __asm__ volatile("tilerelease");
    }
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
    "cmpb $0, has_wide(%rip)\n je 2f\n lea wide_before(%rip), %rcx\n"
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
    "vmovdqu64 (\\n*64)(%rcx), %zmm\\n\n .endr\n"
    ".irp n,0,1,2,3,4,5,6,7\n kmovq 2048+(\\n*8)(%rcx), %k\\n\n .endr\n 2:\n"
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
    "cmpb $0, has_wide(%rip)\n je 3f\n lea wide_after(%rip), %rax\n"
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
    "vmovdqu64 %zmm\\n, (\\n*64)(%rax)\n .endr\n"
    ".irp n,0,1,2,3,4,5,6,7\n kmovq %k\\n, 2048+(\\n*8)(%rax)\n .endr\n 3:\n"
    "pop %rsi\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n ret\n");

static void on_usr1(int number)
{
    (void)number;
    usr1++;
}

/* Tell sw_reserved of the frame's FPU state, as the kernel wrote it. */
static void on_usr2(int number, siginfo_t *info, void *context)
{
    const uint8_t *state = (const uint8_t *)((ucontext_t *)context)->uc_mcontext.fpregs;

    (void)number, (void)info;
    for (int i = 464; i < 512; i++) {
        printf("%02x", state[i]);
    }
    printf("\n");
    fflush(stdout);
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
    if (has_wide && memcmp(&wide_before, &wide_after, sizeof wide_before)) {
        spoiled("a register of AVX-512");
    }
    if (has_tiles) {
        EACH_TILE(STORE_TILE)
        if (memcmp(tiles_before, tiles_after, sizeof tiles_before)) {
            spoiled("a tile of AMX");
        }
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

/* Fill AVX-512's registers where there are any; the lower halves of the first 16 are those of AVX. */
static void fill_wide(void)
{
    __builtin_cpu_init();
    has_wide = __builtin_cpu_supports("avx512bw") != 0;
    for (int i = 0; i < 32; i++) {
        memset(wide_before.registers[i], 0x40 + i, 64);
    }
    for (int i = 0; i < 8; i++) {
        wide_before.masks[i] = 0x1010101010101010UL * (uint64_t)i + 7;
    }
}

/* Fill AMX's tiles, if the processor has them and the kernel lets us; 0 if not. */
static int fill_tiles(void)
{
    if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */)) {
        return 0;
    }
    for (int i = 0; i < 8; i++) {
        tiles.columns[i] = 64;
        tiles.rows[i] = 16;
        memset(tiles_before[i], 0xa0 + i, sizeof tiles_before[i]);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(tiles));
    EACH_TILE(LOAD_TILE)
    has_tiles = 1;
    return 1;
}

/* In words, which states of the processor have values of ours in them. */
static const char *states(int use_tiles)
{
    unsigned a, b, c, d;
    int amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1);
    static char text[80];

    if (amx && use_tiles && !fill_tiles()) {
        spoiled("nothing, but the kernel gives no tiles");
    }
    snprintf(text, sizeof text, "AVX, %s, %s", has_wide ? "AVX-512" : "no AVX-512",
             !amx ? "no AMX" : has_tiles ? "AMX used" : "AMX present");
    return text;
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
    struct sigaction tell = {.sa_sigaction = on_usr2, .sa_flags = SA_RESTART | SA_SIGINFO};
    sigset_t mask;
    uint64_t ended = 0;

    fill_wide();
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGUSR2, &tell, NULL);
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
    printf("%p %p %s\n", (void *)called, (void *)&calls, states(argc > 2));
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
