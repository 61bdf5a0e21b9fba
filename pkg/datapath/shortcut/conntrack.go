package shortcut

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// findConntrack looks up in the kernel's own description of itself (BTF) what
// the program needs of conntrack. module is where that is described; nil
// where conntrack is built in.
func findConntrack() (c conntrack, module *btf.Handle, err error) {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return c, nil, fmt.Errorf("this kernel does not describe itself (CONFIG_DEBUG_INFO_BTF): %w", err)
	}
	specs, in := []*btf.Spec{kernel}, int16(0)
	if kernel.TypeByName(lookupFunc, new(*btf.Func)) != nil {
		module, err = btf.FindHandle(func(info *btf.HandleInfo) bool { return info.IsModule() && info.Name == "nf_conntrack" })
		if err != nil {
			return c, nil, fmt.Errorf("this kernel has no %s: %w", lookupFunc, err)
		}
		in = 1
		spec, err := module.Spec(kernel)
		if err != nil {
			module.Close()
			return c, nil, fmt.Errorf("read what the kernel says of nf_conntrack: %w", err)
		}
		specs = []*btf.Spec{spec, kernel} // a module describes what the kernel does not
	}
	if err := c.find(specs, in); err != nil {
		module.Close() // fine with nil
		return c, nil, err
	}
	c.established, c.stream = timeout("tcp_timeout_established", 5*24*60*60), timeout("udp_timeout_stream", 120)
	if c.hz, err = ticks(); err != nil {
		module.Close()
		return c, nil, err
	}
	return c, module, nil
}

// ticks of the kernel in a second. The coarse clocks are as exact as those.
func ticks() (int32, error) {
	var tick unix.Timespec
	if err := unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &tick); err != nil {
		return 0, fmt.Errorf("length of the kernel's tick: %w", err)
	}
	if ns := tick.Nano(); ns >= 100_000 && ns <= 100_000_000 {
		return int32((1_000_000_000 + ns/2) / ns), nil
	}
	return 0, fmt.Errorf("the kernel says that its tick has %d ns; 10 to 10000 in a second would be right", tick.Nano())
}

const lookupFunc = "bpf_skb_ct_lookup"

// find the functions in the first of specs, and the structures in any.
func (c *conntrack) find(specs []*btf.Spec, in int16) error {
	for name, to := range map[string]*kfunc{lookupFunc: &c.lookup, "bpf_ct_change_timeout": &c.changeTimeout, "bpf_ct_release": &c.release} {
		var f *btf.Func
		if err := specs[0].TypeByName(name, &f); err != nil {
			return fmt.Errorf("this kernel has no %s: %w", name, err)
		}
		id, err := specs[0].TypeID(f)
		if err != nil {
			return fmt.Errorf("number of %s: %w", name, err)
		}
		*to = kfunc{id: int32(id), offset: in}
	}
	status, err1 := offsetOf(specs, "nf_conn", "status")
	timeout, err2 := offsetOf(specs, "nf_conn", "timeout")
	proto, err3 := offsetOf(specs, "nf_conn", "proto")
	state, err4 := offsetOf(specs, "ip_ct_tcp", "state") // one of the union nf_conn.proto
	c.status, c.timeout, c.tcpState = status, timeout, proto+state
	return errors.Join(err1, err2, err3, err4)
}

func offsetOf(specs []*btf.Spec, structure, member string) (int16, error) {
	var s *btf.Struct
	err := btf.ErrNotFound
	for i := 0; i < len(specs) && err != nil; i++ {
		err = specs[i].TypeByName(structure, &s)
	}
	if err != nil {
		return 0, fmt.Errorf("this kernel has no struct %s: %w", structure, err)
	}
	for _, m := range s.Members {
		if m.Name == member {
			return int16(m.Offset.Bytes()), nil
		}
	}
	return 0, fmt.Errorf("this kernel's struct %s has no %s", structure, member)
}

const conntrackSysctls = "/proc/sys/net/netfilter/nf_conntrack_"

// timeout is one of conntrack's, in milliseconds.
func timeout(name string, otherwise int32) int32 {
	seconds := otherwise
	if text, err := os.ReadFile(conntrackSysctls + name); err == nil {
		if n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 32); err == nil && n > 0 {
			seconds = int32(min(n, math.MaxInt32/1000))
		}
	}
	return seconds * 1000
}

// loose says whether conntrack takes up connections whose beginning it has not
// seen.
func loose() bool {
	text, err := os.ReadFile(conntrackSysctls + "tcp_loose")
	return err != nil || strings.TrimSpace(string(text)) != "0"
}
