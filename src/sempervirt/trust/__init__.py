"""Who is who among hosts: a small certificate authority, the identity of a host, invitations.

    authority.key, authority.crt   on the host that `semper host init` made first
    host.key, host.crt             on every host; authority.crt as well

Every connection between hosts is TLS 1.3 with certificates on both ends, all of this authority.
There is no other door: an invitation carries a certificate of its own, good for joining alone.
"""
