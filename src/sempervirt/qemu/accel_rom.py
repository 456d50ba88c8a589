"""The guest that `accel` runs: a ROM of 64 KiB, and the assembly it was made from.

It leaves real mode for 64-bit mode with paging, executes CPUID, takes a breakpoint exception
through its own interrupt table and writes `PASSED` to the debug-exit port. A test assembles
`SOURCE` and compares.
"""

from __future__ import annotations

SOURCE = r"""
    .code16
    .org 0
start:
    cli
    cld
    xorw %ax, %ax
    movw %ax, %es
    movw %ax, %ss
    movw $0x7000, %sp
    movw $0x1000, %di          # page tables at 0x1000-0x3fff
    movw $0x1800, %cx
    rep stosw
    movw $0x2003, %es:0x1000
    movw $0x3003, %es:0x2000
    movw $0x0083, %es:0x3000   # one page of 2 MiB at 0
    lgdtl %cs:(gdtr - start)
    movl $0x20, %eax
    movl %eax, %cr4            # PAE
    movl $0x1000, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    btsl $8, %eax              # EFER.LME
    wrmsr
    movl $0x80000001, %eax     # PG, PE
    movl %eax, %cr0
    ljmpl $8, $(0xf0000 + long - start)
    .code64
long:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $0x7000, %esp
    # an interrupt gate for vector 3 at 0x4000 + 3*16
    movl $(0xf0000 + handler - start), %eax
    movl $0x4030, %edi
    movw %ax, (%rdi)
    movw $8, 2(%rdi)
    movw $0x8e00, 4(%rdi)
    shrl $16, %eax
    movw %ax, 6(%rdi)
    movq $0, 8(%rdi)
    pushq $0x4000
    movw $0x3f, -2(%rsp)
    lidt -2(%rsp)
    movl $1, %eax
    cpuid
    int3
1:  hlt
    jmp 1b
handler:
    movb $0x2a, %al
    outb %al, $0xf4
2:  hlt
    jmp 2b
    .align 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
gdtr:
    .word gdtr - gdt - 1
    .long 0xf0000 + gdt - start
"""

CODE = bytes.fromhex(
    """
    fafc31c08ec08ed0bc0070bf0010b90018f3ab26c7060010032026c7060020033026c70600308300
    2e660f0116d80066b8200000000f22e066b8001000000f22d866b9800000c00f32660fbae8080f30
    66b8010000800f22c066ea61000f00080066b810008ed88ec08ed0bc00700000b8b4000f00bf3040
    000066890766c74702080066c74704008ec1e8106689470648c7470800000000680040000066c744
    24fe3f000f015c24feb8010000000fa2ccf4ebfdb02ae6f4f4ebfd0f1f4400000000000000000000
    ffff0000009baf00ffff00000093cf001700c0000f00
    """
)

PASSED = 0x2A
ROM_BYTES = 64 << 10
# The processor starts 16 bytes below 4 GiB, where the last 16 bytes of the ROM are.
_RESET = ROM_BYTES - 16
_JUMP_TO_START = bytes.fromhex("ea000000f0")  # ljmp $0xf000, $0


def rom() -> bytes:
    """The image for QEMU's -bios."""
    image = bytearray(ROM_BYTES)
    image[: len(CODE)] = CODE
    image[_RESET : _RESET + len(_JUMP_TO_START)] = _JUMP_TO_START
    return bytes(image)
