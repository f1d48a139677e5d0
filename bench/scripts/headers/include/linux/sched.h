#ifndef TASK_COMM_LEN
#define TASK_COMM_LEN 16
#endif
