/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The events: what the hooks saw and decided, kept in memory that is there beforehand.
 *
 * Numbered from 0. The first SG_FIRST_EVENTS stay for ever, since a storm's first event says most; of
 * the later ones the last SG_LATER_EVENTS stay.
 */
#ifndef SEMPER_GUARD_EVENTS_H
#define SEMPER_GUARD_EVENTS_H

#include <linux/sched.h>
#include <linux/types.h>

#include "decision.h"

#define SG_EVENT_VERSION 1
#define SG_FIRST_EVENTS 64
#define SG_LATER_EVENTS 64
/* No line is longer; a reader's buffer has to be as long. */
#define SG_LINE_BYTES 1024

struct sg_event {
	u64 ns;				/* CLOCK_MONOTONIC, without the lock of the timekeeper */
	unsigned long seq;
	unsigned long incident;		/* the first event of the same thread within a second */
	unsigned long caller;
	struct sg_state state;
	struct sg_decision decision;
	u32 preempt_count;
	bool irqs_off;
	int cpu;
	pid_t pid;
	pid_t tgid;
	pid_t owner;			/* of a vhost worker: whom it works for; else 0 */
	char comm[TASK_COMM_LEN];
	char lock[24];			/* the known lock; "" if none */
	char symbol[48];		/* where it was called from */
	char message[160];
};

/* A slot of its own for the caller to fill; any context. Nobody reads it before sg_event_done(). */
struct sg_event *sg_event_claim(void);

/* Shows a filled slot to readers and to the kernel's log, and wakes who waits; any context. */
void sg_event_done(struct sg_event *event);

/* How many were shown; the seq of the next one. Any context. */
unsigned long sg_events_seen(void);

/*
 * Formats the first event from *seq on into a buffer of SG_LINE_BYTES, and moves *seq past it.
 * Returns the length of the line, 0 when there is no further event. Process context.
 */
int sg_event_line(unsigned long *seq, char *line);

/* Whether there is an event from seq on. Any context. */
bool sg_event_is_there(unsigned long seq);

/* Waits for an event from seq on. Returns 0 or -ERESTARTSYS. */
int sg_events_wait(unsigned long seq);

struct file;
struct poll_table_struct;
void sg_events_poll(struct file *file, struct poll_table_struct *table);

void sg_events_init(void);
/* After the last hook is gone. */
void sg_events_exit(void);

/* For the self-test: one JSON string, quoted and escaped, always whole. Returns the length. */
int sg_json_string(char *to, int size, const char *text);

#endif
