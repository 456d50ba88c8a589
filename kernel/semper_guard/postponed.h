/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The death that was put off: how often it was, and its going ahead.
 *
 *   none ──survived──► put off ──"evacuated", deadline_s, max_events──► the real panic, with its dump
 */
#ifndef SEMPER_GUARD_POSTPONED_H
#define SEMPER_GUARD_POSTPONED_H

#include <linux/types.h>

struct sg_event;

/* A fatal event was survived. Any context. */
void sg_postponed_note(const struct sg_event *event);

/* How many were. Any context. */
unsigned int sg_postponed_count(void);

/* Starts the deadline if something was put off since. Hard interrupt context. */
void sg_postponed_arm(void);

/*
 * The VMs are out: panics or restarts for real, and does not return, if a fatal event was survived.
 * Process context.
 */
void sg_postponed_go_ahead(void);

void sg_postponed_init(void);
/* After the last hook is gone: the deadline as well. */
void sg_postponed_exit(void);

#endif
