"""Passed-through devices of a VM: the guest's own driver works with their registers.

    guest's driver ──► QEMU (vfio-user-pci) ──► mediator (semper-vfiod) ──► the device
                            ▲    ▲                    ▲
       doorbells: a page of the mediator's memory     │ control socket
                                 │                    │
          `ports`: configuration by I/O ports ◄── `leaving`, `arriving` ◄── a move

`device` is one device with its mediator, which lives as long as QEMU; `answers` and `client` are
what a mediator says. `leaving` and `arriving` are the two ends of a device's move; both are told by
the mediator which registers there are, and know none themselves. docs/design/passthrough.md has the
whole.
"""
