package firewall

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"unsafe"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// KubeProxy names the traces of Kubernetes' own service proxy in the network
// namespace of the calling thread, or nothing. The kubelet makes chains as
// well (KUBE-IPTABLES-HINT, KUBE-KUBELET-CANARY); these say nothing of a proxy.
func KubeProxy() (string, error) {
	if _, err := net.InterfaceByName("kube-ipvs0"); err == nil {
		return "link kube-ipvs0", nil
	}
	if name, err := once(kubeProxyInNft); name != "" || err != nil {
		return name, err
	}
	return kubeProxyInLegacy()
}

const kubeServices = "KUBE-SERVICES"

// kubeProxyInNft looks for a table kube-proxy, and for what iptables-nft made.
func kubeProxyInNft(s *socket) (string, error) {
	for _, f := range []struct {
		number byte
		name   string
	}{{unix.NFPROTO_IPV4, "ip"}, {unix.NFPROTO_IPV6, "ip6"}} {
		msgs, err := s.ask(unix.NFT_MSG_GETCHAIN, netlink.Dump, f.number)
		if err != nil {
			return "", fmt.Errorf("look for kube-proxy: read chains: %w", err)
		}
		for _, m := range msgs {
			var table, chain string
			if err := each(m, func(ad *netlink.AttributeDecoder) {
				switch ad.Type() {
				case unix.NFTA_CHAIN_TABLE:
					table = ad.String()
				case unix.NFTA_CHAIN_NAME:
					chain = ad.String()
				}
			}); err != nil {
				return "", fmt.Errorf("look for kube-proxy: %w", err)
			}
			switch {
			case table == "kube-proxy":
				return "nft table " + f.name + " kube-proxy", nil
			case table == "nat" && chain == kubeServices:
				return "chain " + kubeServices + " in nft table " + f.name + " nat", nil
			}
		}
	}
	return "", nil
}

// kubeProxyInLegacy looks into the tables of the old iptables. It asks the
// kernel only for a table that is there: asking for another would load it.
func kubeProxyInLegacy() (string, error) {
	for _, f := range []struct {
		names         string
		domain, level int
	}{
		{names: "/proc/thread-self/net/ip_tables_names", domain: unix.AF_INET, level: unix.SOL_IP},
		{names: "/proc/thread-self/net/ip6_tables_names", domain: unix.AF_INET6, level: unix.SOL_IPV6},
	} {
		b, err := os.ReadFile(f.names)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("look for kube-proxy: %w", err)
		}
		if !slices.Contains(strings.Fields(string(b)), "nat") {
			continue
		}
		blob, err := legacyEntries(f.domain, f.level)
		if err != nil {
			return "", fmt.Errorf("look for kube-proxy in iptables-legacy: %w", err)
		}
		if bytes.Contains(blob, []byte(kubeServices+"\x00")) {
			return "chain " + kubeServices + " of iptables-legacy", nil
		}
	}
	return "", nil
}

// Of linux/netfilter_ipv4/ip_tables.h; those of IPv6 have the same numbers.
const (
	iptSoGetInfo    = 64
	iptSoGetEntries = 65
	iptInfoSize     = 84 // struct ipt_getinfo; its last word is the size of the entries
	iptNameLen      = 32
	maxLegacy       = 64 << 20
)

// legacyEntries is the table nat as the kernel keeps it. Names of chains stand
// in it as they are.
func legacyEntries(domain, level int) ([]byte, error) {
	fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	for range 10 { // the table may grow between the two questions
		info := make([]byte, iptInfoSize)
		copy(info, "nat")
		if err := getsockopt(fd, level, iptSoGetInfo, info); err != nil {
			return nil, fmt.Errorf("get info: %w", err)
		}
		size := binary.NativeEndian.Uint32(info[iptInfoSize-4:])
		if size > maxLegacy {
			return nil, fmt.Errorf("table nat has %d bytes, more than anybody's", size)
		}
		head := (iptNameLen + 4 + 7) &^ 7 // the entries are aligned to 8
		get := make([]byte, head+int(size))
		copy(get, "nat")
		binary.NativeEndian.PutUint32(get[iptNameLen:], size)
		err := getsockopt(fd, level, iptSoGetEntries, get)
		if errors.Is(err, unix.EAGAIN) {
			continue
		}
		return get, err
	}
	return nil, unix.EAGAIN
}

func getsockopt(fd, level, option int, b []byte) error {
	n := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
