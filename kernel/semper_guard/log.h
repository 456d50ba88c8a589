/* SPDX-License-Identifier: GPL-2.0 */
/* Before every other header: what the kernel's log has in front of our lines. */
#ifndef SEMPER_GUARD_LOG_H
#define SEMPER_GUARD_LOG_H

#undef pr_fmt
#define pr_fmt(fmt) "semper_guard: " fmt

#endif
