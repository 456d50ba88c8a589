/* SPDX-License-Identifier: GPL-2.0 */
/* Symbols of the kernel that are not exported. */
#ifndef SEMPER_GUARD_SYMBOLS_H
#define SEMPER_GUARD_SYMBOLS_H

/* Process context. Returns 0, or why there is no way to look symbols up. */
int sg_symbols_init(void);

/* The address of a symbol, or 0. May sleep. */
unsigned long sg_symbol(const char *name);

/* The same as a pointer to what is there, or NULL. */
#define sg_variable(name) ((void *)sg_symbol(name))

/* Where ftrace can hook the function at an address, or 0. */
unsigned long sg_ftrace_site(unsigned long address);

#endif
