/* User registers as the kernel hands them to a uprobe. */
#ifndef AIO_TRACE_BENCH_PTRACE_H
#define AIO_TRACE_BENCH_PTRACE_H
#include <linux/types.h>
#if defined(__x86_64__)
struct pt_regs {
    unsigned long r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di;
    unsigned long orig_ax, ip, cs, flags, sp, ss;
};
#elif defined(__aarch64__)
struct pt_regs {
    u64 regs[31];
    u64 sp, pc, pstate;
};
#endif
#endif
