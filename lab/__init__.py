"""Two hosts in network namespaces with etcd and a guest that moves; for tests and benchmarks.

namespaces  network namespaces, and programs in them
network     the bridges, taps and links between two hosts; limits, delays and cuts
etcd        a store of one's own, and a relay that loses answers
world       agents, etcd and the shared image on it
guest       the guest as its host sees it: heartbeats, writers, and a TCP client outside
plain_qemu  QEMU without an agent, for what is compared with it
"""
