package datapath

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"meshd.dev/pkg/datapath/internal/sysctl"
)

const reservedPorts = "net/ipv4/ip_local_reserved_ports"

// ReservePorts keeps the kernel from giving the ports from first to last to
// connections that go out, and says what it did. WireGuard's own are among
// those it chooses from (32768 to 60999): one that a connection of this machine
// has got cannot be listened at until that has ended, and a minute more. Ports
// that others have reserved stay so.
func ReservePorts(first, last uint16) (did string, err error) {
	b, err := os.ReadFile(sysctl.Path(reservedPorts))
	if err != nil {
		return "", fmt.Errorf("read reserved ports: %w", err)
	}
	have := strings.TrimSpace(string(b))
	if reserved(have, first, last) {
		return "", nil
	}
	wish := fmt.Sprintf("%d-%d", first, last)
	if have != "" {
		wish = have + "," + wish
	}
	if len(wish) >= os.Getpagesize() { // the kernel takes no more at once
		return "", fmt.Errorf("reserve ports %d to %d: net.ipv4.ip_local_reserved_ports is too long already; add them where it is set", first, last)
	}
	if err := sysctl.Set(reservedPorts, wish); err != nil {
		return "", fmt.Errorf("reserve ports %d to %d: %w", first, last, err)
	}
	return "sysctl -w net.ipv4.ip_local_reserved_ports=" + wish, nil
}

// reserved reports whether a list as the kernel writes it, like 40000,41000-41005,
// has all ports from first to last.
func reserved(list string, first, last uint16) bool {
	next := int(first)
	for part := range strings.SplitSeq(list, ",") { // in order, and no two touch
		low, high, ok := strings.Cut(part, "-")
		if !ok {
			high = low
		}
		from, err1 := strconv.Atoi(low)
		to, err2 := strconv.Atoi(high)
		if err1 == nil && err2 == nil && from <= next && next <= to {
			next = to + 1
		}
	}
	return next > int(last)
}
