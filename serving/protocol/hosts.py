"""Which host names mean this machine."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether it is localhost or a literal loopback address, without a port. Other names could lead anywhere."""
    ip = address(host)
    if ip is None:
        return host.lower() == "localhost"
    return ip.is_loopback or bool(getattr(ip, "ipv4_mapped", None) and ip.ipv4_mapped.is_loopback)


def address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Returns the literal address, None for a name."""
    try:
        return ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None
