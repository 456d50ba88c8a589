// SPDX-License-Identifier: GPL-2.0
/* /dev/semper_guard: events to the agent, commands from the agent. See device.h. */
#include <linux/capability.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include "device.h"
#include "events.h"
#include "lockup.h"
#include "policy.h"
#include "postponed.h"
#include "shutdown.h"

#define COMMAND_BYTES 32

struct reader {
	struct mutex lock;	/* one line at a time */
	unsigned long seq;	/* of the next event */
	char line[SG_LINE_BYTES];
};

/* The line's memory is had at open: a host that is dying may have none. */
static int open(struct inode *inode, struct file *file)
{
	struct reader *reader = kzalloc(sizeof(*reader), GFP_KERNEL);

	if (!reader)
		return -ENOMEM;
	mutex_init(&reader->lock);
	file->private_data = reader;
	return stream_open(inode, file);
}

static int release(struct inode *inode, struct file *file)
{
	kfree(file->private_data);
	return 0;
}

/* The lock is held. */
static ssize_t read_line(struct reader *reader, char __user *to, size_t size)
{
	unsigned long seq = reader->seq;
	int length = sg_event_line(&seq, reader->line);

	if (length > size)
		return -EINVAL;
	if (copy_to_user(to, reader->line, length))
		return -EFAULT;
	reader->seq = seq;
	return length;
}

static ssize_t read(struct file *file, char __user *to, size_t size, loff_t *offset)
{
	struct reader *reader = file->private_data;
	ssize_t length;

	for (;;) {
		if (mutex_lock_interruptible(&reader->lock))
			return -ERESTARTSYS;
		length = read_line(reader, to, size);
		mutex_unlock(&reader->lock);
		if (length)
			return length;
		if (file->f_flags & O_NONBLOCK)
			return -EAGAIN;
		if (sg_events_wait(READ_ONCE(reader->seq)))
			return -ERESTARTSYS;
	}
}

static int command(char *text)
{
	unsigned int cpu;

	if (!strcmp(text, "evacuated")) {
		sg_shutdown_go_on();
		sg_postponed_go_ahead();
		return 0;
	}
	if (!strcmp(text, "allow")) {
		sg_policy_allow();
		pr_notice("nothing is put off any more\n");
		return 0;
	}
	if (!strncmp(text, "rescue ", 7) && !kstrtouint(text + 7, 10, &cpu))
		return sg_lockup_rescue(cpu);
	return -EINVAL;
}

static ssize_t write(struct file *file, const char __user *from, size_t size, loff_t *offset)
{
	char text[COMMAND_BYTES];
	int error;

	if (!capable(CAP_SYS_BOOT))
		return -EPERM;
	if (!size || size >= sizeof(text))
		return -EINVAL;
	if (copy_from_user(text, from, size))
		return -EFAULT;
	text[size] = '\0';
	if (strlen(text) != size)
		return -EINVAL;
	if (text[size - 1] == '\n')
		text[size - 1] = '\0';
	error = command(text);
	return error ? error : size;
}

static __poll_t poll(struct file *file, poll_table *table)
{
	struct reader *reader = file->private_data;

	sg_events_poll(file, table);
	return sg_event_is_there(READ_ONCE(reader->seq)) ? EPOLLIN | EPOLLRDNORM : 0;
}

static const struct file_operations operations = {
	.owner = THIS_MODULE,
	.open = open,
	.release = release,
	.read = read,
	.write = write,
	.poll = poll,
};

static struct miscdevice device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "semper_guard",
	.fops = &operations,
	.mode = 0600,
};

int sg_device_init(void)
{
	return misc_register(&device);
}

void sg_device_exit(void)
{
	misc_deregister(&device);
}
