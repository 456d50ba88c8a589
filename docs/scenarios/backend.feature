Feature: The process that serves a disk dies
  One process serves a VM's disk, the backend. A second one, the spare, has everything prepared
  and waits. Whatever ends the backend, the spare goes on at once with what was under way: the
  guest waits for some milliseconds and notices nothing else.

  Background:
    Given hosts a and b, which share their storage
    And VM web on host a, which writes to its disk and reads back what it wrote

  Scenario: The backend is killed, and at last with its spare
    When the backend of web is killed 5 times
    Then each time another process served the disk within 5 seconds
    When the backend of web and its spare are killed at once
    Then each time another process served the disk within 10 seconds
    And the disk of web is guarded by a spare
    And every block holds what the guest wrote, no request failed, and none hangs

  Scenario: The agent is gone when the backend dies
    When the agent of host a is killed
    And the backend of web is killed, and nobody is there to start another one
    Then the guest still writes
    When the agent of host a is started again
    Then the disk of web is guarded by a spare
    And every block holds what the guest wrote, no request failed, and none hangs

  Scenario: The guest is a judge that sees damage
    When web is paused, its image is overwritten behind its back, and web runs on
    Then the guest finds blocks that do not hold what it wrote
