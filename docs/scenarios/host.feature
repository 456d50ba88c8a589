Feature: A host is emptied
  A host is to be repaired. Its VMs move to another host one after the other, while they run.

  Scenario: Every VM of a host moves away
    Given hosts a and b, which share their storage
    And VM web on host a, which writes to its disk and reads back what it wrote
    And VM db on host a
    And a TCP client outside, which never connects anew
    When the operator empties host a
    Then host a is out of service
    And web runs on host b
    And db runs on host b
    And host a has no process of a VM left
    And the guest stood still for less than 20000 milliseconds
    And the guest has not booted again
    And the client outside still has its connection
    And every block holds what the guest wrote, no request failed, and none hangs
