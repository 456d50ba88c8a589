// SPDX-License-Identifier: GPL-2.0
/*
 * cost [MILLISECONDS]: what a system call and a switch between two processes take, in nanoseconds, as
 * "SYSCALL SWITCH". Each is measured for so long; the hooks of the guard must not show in them.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1e9 + time.tv_nsec;
}

static double syscall_ns(double for_ns)
{
	double begin = now_ns(), passed;
	long count = 0;
	int i;

	do {
		for (i = 0; i < 1000; i++)
			syscall(SYS_getppid);
		count += 1000;
		passed = now_ns() - begin;
	} while (passed < for_ns);
	return passed / count;
}

/* A byte goes to a child and comes back: two switches. */
static double switch_ns(double for_ns)
{
	int there[2], back[2];
	double begin, passed;
	long count = 0;
	char byte = 0;
	pid_t child;

	if (pipe(there) || pipe(back))
		exit(1);
	child = fork();
	if (!child) {
		close(there[1]);
		while (read(there[0], &byte, 1) == 1)
			if (write(back[1], &byte, 1) != 1)
				break;
		_exit(0);
	}
	begin = now_ns();
	do {
		if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
			exit(1);
		count++;
		passed = now_ns() - begin;
	} while (passed < for_ns);
	close(there[1]);
	close(there[0]);
	waitpid(child, NULL, 0);
	return passed / count / 2;
}

int main(int argc, char **argv)
{
	double for_ns = (argc > 1 ? atof(argv[1]) : 300) * 1e6;
	double call = syscall_ns(for_ns);

	printf("%.1f %.1f\n", call, switch_ns(for_ns));
	return 0;
}
