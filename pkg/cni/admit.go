package cni

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/cni/rtnl"
	"meshd.dev/pkg/mesh"
)

// The firewall lets nothing to or from a pod whose link and addresses are not
// in its sets (mesh.PodSet). ADD puts them in, one transaction straight to the
// kernel, before it routes anything to the pod; so a pod is never reachable
// and unprotected, whether meshd runs or not. The host ports go with it. What
// somebody flushes meshd brings back from the records; where the table is
// missing, no pod is attached.

// local is the pod as the firewall has to know it.
func (r Record) local() mesh.LocalPod {
	return mesh.LocalPod{Link: r.HostLink, Addrs: r.Addresses, HostPorts: r.HostPorts}
}

// admit puts the pod into the sets.
func (r Record) admit() error {
	if r.Table == "" {
		return nil
	}
	nf, err := rtnl.OpenNetfilter()
	if err != nil {
		return err
	}
	defer nf.Close()
	if err := hasRules(nf, r.Table); err != nil {
		return err
	}
	ops := take(r.Table, mesh.LocalPod{Link: r.HostLink, Addrs: r.former}.Elements())
	for _, e := range r.local().Elements() {
		ops = append(ops, rtnl.ElementAdd{Table: r.Table, SetElement: e})
	}
	err = nf.Do(ops...)
	switch {
	case errors.Is(err, unix.ENOENT):
		return types.NewError(types.ErrTryAgainLater, "the firewall is not ready",
			fmt.Sprintf("table inet %s is missing or not meshd's, and no pod goes without it: is meshd running? (%v)", r.Table, err))
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
		return types.NewError(CodePortTaken, "host port is taken", fmt.Sprintf("another pod of this node has it (%v); see `meshctl pods`", err))
	case err != nil:
		return err
	}
	r.forgetFlows(nf)
	return nil
}

// withdraw takes everything of the pod out of the sets: nothing gets to it or
// comes from it any more. It is done from the kernel's own list, so that it
// holds for a record that cannot be read, and takes nothing of anybody else.
func (r Record) withdraw() error {
	if r.Table == "" {
		return nil
	}
	nf, err := rtnl.OpenNetfilter()
	if err != nil {
		return err
	}
	defer nf.Close()
	for range maxTries {
		var ops []rtnl.Op
		if ops, err = r.withdrawal(nf); err != nil {
			break
		}
		if err = nf.Do(ops...); !errors.Is(err, unix.ENOENT) {
			break // else meshd was first: look again
		}
	}
	if errors.Is(err, unix.ENOENT) { // no such table: nothing to take out of it
		return nil
	}
	if err == nil && len(r.HostPorts) > 0 {
		err = nf.ForgetConnections(r.Addresses)
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
			err = nil // a kernel that cannot pick them out
		}
	}
	return err
}

func (r Record) withdrawal(nf *rtnl.Netfilter) (ops []rtnl.Op, err error) {
	ops = take(r.Table, mesh.LocalPod{Link: r.HostLink, Addrs: r.Addresses}.Elements())
	if len(r.HostPorts) == 0 && !r.corrupt {
		return ops, nil
	}
	for _, a := range r.Addresses {
		for _, base := range []string{mesh.HostPortMap, mesh.HairpinSet} {
			have, err := nf.Elements(r.Table, base+familyDigit(a))
			if err != nil {
				return nil, err
			}
			for _, e := range have {
				if leadsTo(e, a) {
					ops = append(ops, rtnl.ElementDel{Table: r.Table, SetElement: e})
				}
			}
		}
	}
	return ops, nil
}

// take takes elements without a value out. They are added first: then it is no
// error that one is not there.
func take(table string, elements []mesh.SetElement) (ops []rtnl.Op) {
	for _, e := range elements {
		ops = append(ops, rtnl.ElementAdd{Table: table, SetElement: e}, rtnl.ElementDel{Table: table, SetElement: e})
	}
	return ops
}

// leadsTo says whether a host port, or a hairpin, is the pod's with address a:
// its first field is.
func leadsTo(e mesh.SetElement, a netip.Addr) bool {
	first := e.Value
	if first == "" {
		first = e.Key
	}
	b := a.AsSlice()
	return len(first) >= len(b) && first[:len(b)] == string(b)
}

func familyDigit(a netip.Addr) string {
	if a.Is4() {
		return "4"
	}
	return "6"
}

// forgetFlows to the UDP host ports that began before there was a pod. Best
// effort, and of this machine's own addresses only: what other pods have with
// such a port elsewhere is theirs.
func (r Record) forgetFlows(nf *rtnl.Netfilter) {
	own := sync.OnceValue(ownAddrs) // mostly there is no such flow, and nobody asks
	for _, p := range r.HostPorts {
		if p.Protocol != mesh.UDP {
			continue
		}
		_ = nf.ForgetFlows(p.HostPort, func(dst netip.Addr) bool {
			return r.openOn(p, dst) && slices.Contains(own(), dst)
		})
	}
}

// openOn says whether a host port takes what is sent to an address of this
// machine.
func (r Record) openOn(p mesh.HostPort, dst netip.Addr) bool {
	if !slices.ContainsFunc(r.Addresses, func(a netip.Addr) bool { return a.Is4() == dst.Is4() }) {
		return false
	}
	return !p.HostIP.IsValid() || p.HostIP == dst || p.HostIP.IsUnspecified() && p.HostIP.Is4() == dst.Is4()
}

// ownAddrs are those of this machine; none if it does not say.
func ownAddrs() []netip.Addr {
	host, err := rtnl.Open()
	if err != nil {
		return nil
	}
	defer host.Close()
	own, _ := host.OwnAddrs()
	return own
}

// notAdmitted lists what of the pod is not in the sets.
func (r Record) notAdmitted() ([]string, error) {
	if r.Table == "" {
		return nil, nil
	}
	nf, err := rtnl.OpenNetfilter()
	if err != nil {
		return nil, err
	}
	defer nf.Close()
	var missing []string
	have := map[string][]mesh.SetElement{}
	for _, e := range r.local().Elements() {
		if _, read := have[e.Set]; !read {
			if have[e.Set], err = nf.Elements(r.Table, e.Set); err != nil && !errors.Is(err, unix.ENOENT) {
				return nil, err
			}
		}
		if !slices.Contains(have[e.Set], e) {
			missing = append(missing, fmt.Sprintf("element %s in set %s of table inet %s (firewall)", e, e.Set, r.Table))
		}
	}
	return missing, nil
}

// firewallReady says whether a pod could be admitted.
func firewallReady(table string) error {
	if table == "" {
		return nil
	}
	nf, err := rtnl.OpenNetfilter()
	if err != nil {
		return err
	}
	defer nf.Close()
	for _, set := range []string{mesh.PodSet + "4", mesh.PodSet + "6"} {
		if ok, err := nf.HasSet(table, set); err != nil || !ok {
			return errors.Join(fmt.Errorf("table inet %s has no set %s: is meshd running?", table, set), err)
		}
	}
	return hasRules(nf, table)
}

// hasRules says whether the sets mean anything: somebody's "nft flush table"
// takes the rules away and leaves the sets. A transaction has no way to need a
// rule, so it is asked before.
func hasRules(nf *rtnl.Netfilter, table string) error {
	for _, chain := range []string{mesh.AntispoofChain, mesh.PodChain, mesh.LeavingChain} {
		jumps := uint32(0)
		if chain == mesh.PodChain { // from AntispoofChain
			jumps = 1
		}
		ok, err := nf.HasRules(table, chain, jumps)
		if err != nil {
			return err
		}
		if !ok {
			return types.NewError(types.ErrTryAgainLater, "the firewall is not ready",
				fmt.Sprintf("chain %s of table inet %s is missing or has no rules, and no pod goes without it: is meshd running?", chain, table))
		}
	}
	return nil
}
