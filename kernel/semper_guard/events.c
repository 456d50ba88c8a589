// SPDX-License-Identifier: GPL-2.0
/* The events: what the hooks saw and decided, kept in memory that is there beforehand. */
#include <linux/atomic.h>
#include <linux/irq_work.h>
#include <linux/kernel.h>
#include <linux/kmsg_dump.h>
#include <linux/poll.h>
#include <linux/string.h>
#include <linux/timekeeping.h>
#include <linux/version.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "events.h"
#include "postponed.h"
#include "symbols.h"

#define SLOTS (SG_FIRST_EVENTS + SG_LATER_EVENTS)
#define INCIDENT_NS NSEC_PER_SEC

struct slot {
	struct sg_event event;
	unsigned long shown;	/* seq + 1 of the event in the slot; 0 while it is being filled */
};

static struct slot slots[SLOTS];
static atomic_long_t claimed = ATOMIC_LONG_INIT(0);
static DECLARE_WAIT_QUEUE_HEAD(readers);

/* The last event's, for sg_event_claim(). Torn at worst: then an incident is told as two. */
static pid_t last_pid;
static u64 last_ns;
static unsigned long last_incident;

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
static void (*dump_log)(enum kmsg_dump_reason reason, const char *why);
#define DUMP_LOG_SYMBOL "kmsg_dump_desc"
#define DUMP_LOG() dump_log(KMSG_DUMP_OOPS, "semper_guard")
#else
static void (*dump_log)(enum kmsg_dump_reason reason);
#define DUMP_LOG_SYMBOL "kmsg_dump"
#define DUMP_LOG() dump_log(KMSG_DUMP_OOPS)
#endif

/* Into pstore, if there is one: a host that dies later in spite of all has said why. */
static void keep_log(struct work_struct *work)
{
	if (dump_log)
		DUMP_LOG();
}
static DECLARE_WORK(keep_log_work, keep_log);

/* In hard interrupt context, soon after an event in whatever context. */
static void wake(struct irq_work *work)
{
	wake_up_interruptible_all(&readers);
	sg_postponed_arm();
	schedule_work(&keep_log_work);
}
static DEFINE_IRQ_WORK(wake_work, wake);

static struct slot *slot_of(unsigned long seq)
{
	if (seq < SG_FIRST_EVENTS)
		return &slots[seq];
	return &slots[SG_FIRST_EVENTS + (seq - SG_FIRST_EVENTS) % SG_LATER_EVENTS];
}

struct sg_event *sg_event_claim(void)
{
	unsigned long seq = atomic_long_fetch_inc(&claimed);
	struct slot *slot = slot_of(seq);
	struct sg_event *event = &slot->event;

	WRITE_ONCE(slot->shown, 0);
	/* Pairs with the second look of sg_event_line(): who sees new words sees the zero. */
	smp_wmb();
	memset(event, 0, sizeof(*event));
	event->seq = seq;
	event->ns = ktime_get_mono_fast_ns();
	if (current->pid != last_pid || event->ns - last_ns > INCIDENT_NS)
		last_incident = seq;
	event->incident = last_incident;
	last_pid = current->pid;
	last_ns = event->ns;
	return event;
}

void sg_event_done(struct sg_event *event)
{
	struct slot *slot = container_of(event, struct slot, event);

	/* Pairs with sg_event_line(): the event is whole before its number shows. */
	smp_store_release(&slot->shown, event->seq + 1);
	irq_work_queue(&wake_work);
	pr_emerg("event %lu: %s in %s by %s[%d] on cpu %d: %s, %s: %s\n", event->seq,
		 sg_kind_name(event->state.kind), sg_context_name(event->state.context),
		 event->comm, event->pid, event->cpu,
		 sg_verdict_name(event->decision.verdict),
		 sg_reason_name(event->decision.reason), event->message);
}

unsigned long sg_events_seen(void)
{
	return atomic_long_read(&claimed);
}

/* The first event that is still there, from seq on. */
static unsigned long oldest_from(unsigned long seq)
{
	unsigned long end = sg_events_seen();

	if (seq >= SG_FIRST_EVENTS && end > SG_LATER_EVENTS)
		return max(seq, end - SG_LATER_EVENTS);
	return seq;
}

int sg_json_string(char *to, int size, const char *text)
{
	int at = 0;

	to[at++] = '"';
	/* Room for the longest escape, the quote and the zero. */
	for (; *text && at < size - 8; text++) {
		unsigned char c = *text;

		if (c == '"' || c == '\\') {
			to[at++] = '\\';
			to[at++] = c;
		} else if (c < 0x20 || c >= 0x7f) {
			at += scnprintf(to + at, size - at, "\\u%04x", c);
		} else {
			to[at++] = c;
		}
	}
	to[at++] = '"';
	to[at] = '\0';
	return at;
}

static const char *boolean(bool value)
{
	return value ? "true" : "false";
}

/* One line of JSON with a line feed, of less than SG_LINE_BYTES. */
static int format(const struct sg_event *event, unsigned long lost, char *line)
{
	const struct sg_state *state = &event->state;
	/* A message of which every byte is escaped is cut, and not the line. */
	char comm[48], lock[48], symbol[72], message[320];

	sg_json_string(comm, sizeof(comm), event->comm);
	sg_json_string(lock, sizeof(lock), event->lock);
	sg_json_string(symbol, sizeof(symbol), event->symbol);
	sg_json_string(message, sizeof(message), event->message);
	return scnprintf(line, SG_LINE_BYTES,
			 "{\"v\":%d,\"seq\":%lu,\"incident\":%lu,\"lost\":%lu,\"ns\":%llu,"
			 "\"kind\":\"%s\",\"verdict\":\"%s\",\"reason\":\"%s\",\"policy\":\"%s\","
			 "\"context\":\"%s\",\"thread\":\"%s\",\"caller\":%s,\"cpu\":%d,"
			 "\"pid\":%d,\"tgid\":%d,\"owner\":%d,\"comm\":%s,"
			 "\"depth\":%u,\"bh_off\":%s,\"irqs_off\":%s,\"rcu_depth\":%u,"
			 "\"preempt_count\":%u,\"lock\":%s,\"before\":%u,\"message\":%s}\n",
			 SG_EVENT_VERSION, event->seq, event->incident, lost, event->ns,
			 sg_kind_name(state->kind), sg_verdict_name(event->decision.verdict),
			 sg_reason_name(event->decision.reason), sg_policy_name(state->policy),
			 sg_context_name(state->context), sg_thread_name(state->thread), symbol,
			 event->cpu, event->pid, event->tgid, event->owner, comm, state->depth,
			 boolean(state->bh_off), boolean(event->irqs_off), state->rcu_depth,
			 event->preempt_count, lock, state->before, message);
}

int sg_event_line(unsigned long *seq, char *line)
{
	unsigned long wanted;

	for (wanted = oldest_from(*seq); wanted < sg_events_seen(); wanted = oldest_from(wanted)) {
		struct slot *slot = slot_of(wanted);
		int length;

		/* Pairs with sg_event_done(). */
		if (smp_load_acquire(&slot->shown) != wanted + 1) {
			if (oldest_from(wanted) == wanted)
				return 0; /* It is being filled, and its end wakes the reader. */
			continue;
		}
		length = format(&slot->event, wanted - *seq, line);
		/* Pairs with sg_event_claim(). */
		smp_rmb();
		if (READ_ONCE(slot->shown) == wanted + 1) {
			*seq = wanted + 1;
			return length;
		}
	}
	return 0;
}

bool sg_event_is_there(unsigned long seq)
{
	unsigned long wanted = oldest_from(seq);

	return wanted < sg_events_seen() && READ_ONCE(slot_of(wanted)->shown) == wanted + 1;
}

int sg_events_wait(unsigned long seq)
{
	return wait_event_interruptible(readers, sg_event_is_there(seq));
}

void sg_events_poll(struct file *file, struct poll_table_struct *table)
{
	poll_wait(file, &readers, table);
}

void sg_events_init(void)
{
	dump_log = sg_variable(DUMP_LOG_SYMBOL);
	if (!dump_log)
		pr_notice("no %s: events do not go into pstore\n", DUMP_LOG_SYMBOL);
}

void sg_events_exit(void)
{
	irq_work_sync(&wake_work);
	cancel_work_sync(&keep_log_work);
}
