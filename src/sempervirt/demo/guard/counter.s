# A virtual machine of 512 bytes. At its boot it draws a nonce, then it counts, a line for each tick of the
# timer (55 ms), to its first serial port: "C NONCE COUNT", both as eight hexadecimal digits.
    .code16
    .globl _start
_start:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %ss
    movw $0x7c00, %sp
    sti
    rdtsc
    movl %eax, %esi
    xorl %ebx, %ebx
count:
    incl %ebx
    movb $'C', %al
    call put
    movl %esi, %edx
    call number
    movl %ebx, %edx
    call number
    movb $'\n', %al
    call put
    movl 0x46c, %eax        # the BIOS counts the ticks here
wait:
    hlt
    cmpl %eax, 0x46c
    je wait
    jmp count
number:                     # a blank, then %edx
    movb $' ', %al
    call put
    movw $8, %cx
digit:
    roll $4, %edx
    movb %dl, %al
    andb $15, %al
    addb $'0', %al
    cmpb $'9', %al
    jbe decimal
    addb $7, %al
decimal:
    call put
    loop digit
    ret
put:                        # %al, once the port has room
    pushw %dx
    pushw %ax
    movw $0x3fd, %dx
full:
    inb %dx, %al
    testb $0x20, %al
    jz full
    popw %ax
    movw $0x3f8, %dx
    outb %al, %dx
    popw %dx
    ret
    .org 510
    .word 0xaa55
