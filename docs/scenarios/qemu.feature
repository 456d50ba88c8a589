Feature: QEMU is upgraded under a running VM
  After an upgrade of QEMU a VM still runs in the old program. `semper vm restart-qemu` moves it
  to a process of the installed one: the guest's memory stays where it is, the disk stays served.

  Scenario: A VM goes on in a new QEMU process
    Given hosts a and b, which share their storage
    And VM web on host a, which writes to its disk and reads back what it wrote
    And a TCP client outside, which never connects anew
    When the operator moves web to a new QEMU process
    Then web runs on host a in another QEMU process
    And the guest stood still for less than 10000 milliseconds
    And the guest has not booted again
    And the client outside still has its connection
    And every block holds what the guest wrote, no request failed, and none hangs
