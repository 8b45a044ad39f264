"""Which network interface of this host has an address."""

import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915  # linux/sockios.h


def interface_of(address: str) -> str | None:
    """Return the name of the interface with an IPv4 address; None where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                # struct ifreq: the name, then a sockaddr_in: family, port, address.
                answer = fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, struct.pack("16s24x", name.encode()))
            except OSError:
                continue  # an interface without an address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
