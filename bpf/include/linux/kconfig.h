/* Included by BCC ahead of every program. */
#ifndef AIO_TRACE_KCONFIG_H
#define AIO_TRACE_KCONFIG_H
#define CONFIG_BPF_SYSCALL 1
#endif
