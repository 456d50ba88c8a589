/* SPDX-License-Identifier: GPL-2.0 */
/* An orderly shutdown or reboot waits for the VMs, within a bound. */
#ifndef SEMPER_GUARD_SHUTDOWN_H
#define SEMPER_GUARD_SHUTDOWN_H

/* The VMs are out: nothing waits any more. */
void sg_shutdown_go_on(void);

int sg_shutdown_init(void);
void sg_shutdown_exit(void);

#endif
