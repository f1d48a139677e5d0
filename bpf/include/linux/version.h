/* BCC's helpers.h compares versions only for structures that aio-trace does not use. */
#ifndef AIO_TRACE_VERSION_H
#define AIO_TRACE_VERSION_H
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 4, 0)
#endif
