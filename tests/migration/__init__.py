"""Two hosts in network namespaces, a guest that moves between them, and everything that dies.

network     the namespaces, bridges, taps and links; limits, delays and cuts
world       agents, etcd and the shared image on it
guest       the guest as its host sees it: heartbeats, writers, and a TCP client outside
"""
