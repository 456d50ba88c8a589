/* SPDX-License-Identifier: GPL-2.0 */
/*
 * /dev/semper_guard: events to the agent, commands from the agent. For root alone (0600).
 *
 * read   one line of JSON, at most SG_LINE_BYTES; a shorter buffer is -EINVAL and loses nothing.
 *        Each open file begins with the first event. "lost" is how many were overwritten before it.
 * poll   readable when there is a further event.
 * write  one command, with or without a line feed (CAP_SYS_BOOT):
 *        "evacuated"   the VMs are out: the panic that was put off happens now, or the shutdown goes on
 *        "allow"       from now on nothing is put off
 *        "rescue CPU"  parks what loops in the kernel on that CPU
 */
#ifndef SEMPER_GUARD_DEVICE_H
#define SEMPER_GUARD_DEVICE_H

int sg_device_init(void);
void sg_device_exit(void);

#endif
