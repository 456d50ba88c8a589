Feature: The store is gone while VMs run
  The store (etcd) says which host owns which VM. Running VMs do not need it; whatever would
  change an owner is refused until the store is back, and nothing has changed then.

  Scenario: etcd is lost, and comes back
    Given hosts a and b, which share their storage
    And VM web on host a, which writes to its disk and reads back what it wrote
    When etcd is killed
    Then the guest still writes
    When the backend of web is killed 2 times
    Then each time another process served the disk within 5 seconds
    And the operator is told that etcd does not answer and nothing was changed, when asking to start db
    And the operator is told that etcd does not answer and nothing was changed, when asking to move web
    And web runs on host a
    When etcd is started again
    And the operator empties host a
    Then web runs on host b
    And the guest has not booted again
    And every block holds what the guest wrote, no request failed, and none hangs
