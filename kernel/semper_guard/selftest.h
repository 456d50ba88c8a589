/* SPDX-License-Identifier: GPL-2.0 */
/* What has to hold before anything is hooked. */
#ifndef SEMPER_GUARD_SELFTEST_H
#define SEMPER_GUARD_SELFTEST_H

/* Returns 0, or -EINVAL after saying what does not hold. */
int sg_selftest(void);

#endif
