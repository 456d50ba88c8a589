// SPDX-License-Identifier: GPL-2.0
/*
 * misuse COUNT [SEED]: so many calls on /dev/semper_guard by a program that is hostile, or dies in the
 * middle: random commands, buffers that are too short or not there, readers that vanish. Whoever writes
 * one of the real commands by chance (1 of 2^72) has earned what follows.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define DEVICE "/dev/semper_guard"
#define FILES 16

static void *volatile nowhere = (void *)8;

static int open_device(void)
{
	int file = open(DEVICE, O_RDWR | O_NONBLOCK | O_CLOEXEC);

	if (file < 0) {
		perror(DEVICE);
		exit(1);
	}
	return file;
}

/* A process that waits for an event, and is killed while it does. */
static void vanish(void)
{
	pid_t child = fork();

	if (!child) {
		char byte[1024];
		int file = open(DEVICE, O_RDONLY);

		while (read(file, byte, sizeof(byte)) > 0)
			;
		_exit(0);
	}
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
}

int main(int argc, char **argv)
{
	static const char *const near[] = {
		"evacuate", "evacuatedd", "allowed", "rescue ", "rescue -1", "rescue 99999999999",
		"rescue 4096", " allow", "", "\n", "allow \n",
	};
	long count = argc > 1 ? atol(argv[1]) : 1000;
	int files[FILES], i;
	char buffer[2048];

	srandom(argc > 2 ? atol(argv[2]) : 1);
	for (i = 0; i < FILES; i++)
		files[i] = open_device();
	while (count--) {
		int *file = &files[random() % FILES];
		size_t size = random() % 48;
		const char *text;
		struct pollfd asked = { .fd = *file, .events = POLLIN };

		switch (random() % 8) {
		case 0:
			close(*file);
			*file = open_device();
			break;
		case 1:
			if (read(*file, buffer, random() % sizeof(buffer)) > (ssize_t)sizeof(buffer))
				return 1;
			break;
		case 2:
			if (read(*file, nowhere, 1024) > 0 || write(*file, nowhere, size) > 0)
				return 1;
			break;
		case 3:
			poll(&asked, 1, 0);
			break;
		case 4:
			text = near[random() % (sizeof(near) / sizeof(near[0]))];
			if (write(*file, text, strlen(text)) > 0)
				return 1;
			break;
		case 5:
			if (!ioctl(*file, random(), buffer) || lseek(*file, random(), SEEK_SET) > 0 ||
			    mmap(NULL, 4096, PROT_READ, MAP_SHARED, *file, 0) != MAP_FAILED)
				return 1;
			break;
		case 6:
			if (!(count % 1000))
				vanish();
			break;
		default:
			for (i = 0; i < (int)size; i++)
				buffer[i] = random();
			if (write(*file, buffer, size) > 0)
				return 1;
		}
	}
	return 0;
}
