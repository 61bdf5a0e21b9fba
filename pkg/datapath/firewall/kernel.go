package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/mesh"
)

const (
	// chunk of elements in one message: an attribute holds 64 KiB.
	chunk = 400
	// socketBuffer must take a whole transaction, and the answers to it.
	socketBuffer = 64 << 20
	ruleComment  = 0 // NFTNL_UDATA_RULE_COMMENT
)

var ours = &nftables.Table{Name: mesh.FirewallTable, Family: nftables.TableFamilyINet}

// socket is a connection to the rules of a network namespace. Opening one is
// cheap; closing one waits while the kernel has rules to destroy. One that gave
// an error is not to be used again: answers may be left in it.
type socket struct {
	nft *nftables.Conn
	raw *netlink.Conn // the same
}

// dial opens a socket in the namespace of the calling thread.
func dial() (*socket, error) {
	s := &socket{}
	var err error
	s.nft, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		s.raw = c
		return errors.Join(c.SetWriteBuffer(socketBuffer), c.SetReadBuffer(socketBuffer))
	}))
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	return s, nil
}

// port by which the kernel names who changed something.
func (s *socket) port() uint32 { return s.raw.PID() }

func (s *socket) close() { _ = s.nft.CloseLasting() }

// once calls f with a socket for this one time.
func once[T any](f func(*socket) (T, error)) (T, error) {
	s, err := dial()
	if err != nil {
		var none T
		return none, err
	}
	defer s.close()
	return f(s)
}

// ask sends one nftables request and returns what came back.
func (s *socket) ask(typ uint16, flags netlink.HeaderFlags, family byte, attrs ...netlink.Attribute) ([]netlink.Message, error) {
	b, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		return nil, err
	}
	for try := 0; ; try++ {
		msgs, err := s.raw.Execute(netlink.Message{
			Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | typ), Flags: netlink.Request | flags},
			Data:   append([]byte{family, unix.NFNETLINK_V0, 0, 0}, b...),
		})
		if err != nil || !slices.ContainsFunc(msgs, interrupted) {
			return msgs, err
		}
		if try == maxInterrupted {
			return nil, fmt.Errorf("somebody changes rules all the time: %w", unix.EINTR)
		}
	}
}

// maxInterrupted is how often a list is read again.
const maxInterrupted = 20

// interrupted reports whether the rules changed while they were listed: then
// some of them may be missing (NLM_F_DUMP_INTR of linux/netlink.h).
func interrupted(m netlink.Message) bool { return m.Header.Flags&unix.NLM_F_DUMP_INTR != 0 }

// each calls f for every attribute of a message.
func each(m netlink.Message, f func(*netlink.AttributeDecoder)) error {
	if len(m.Data) < 4 {
		return fmt.Errorf("short answer of %d bytes", len(m.Data))
	}
	ad, err := netlink.NewAttributeDecoder(m.Data[4:])
	if err != nil {
		return err
	}
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		f(ad)
	}
	return ad.Err()
}

// generation grows with every change of any rule in this namespace.
func (s *socket) generation() (uint32, error) {
	msgs, err := s.ask(unix.NFT_MSG_GETGEN, 0, unix.NFPROTO_UNSPEC)
	if err != nil {
		return 0, fmt.Errorf("read generation of rules: %w", err)
	}
	var gen uint32
	for _, m := range msgs {
		if err := each(m, func(ad *netlink.AttributeDecoder) {
			if ad.Type() == unix.NFTA_GEN_ID {
				gen = ad.Uint32()
			}
		}); err != nil {
			return 0, fmt.Errorf("read generation of rules: %w", err)
		}
	}
	return gen, nil
}

// read is what the kernel has. A table that cannot be understood is not ours
// as it should be: it comes back as one without chains.
func (s *socket) read() (*table, error) {
	t := &table{chains: map[string]string{}, sets: map[string]string{}, elements: map[string]map[element]string{}}
	_, err := s.ask(unix.NFT_MSG_GETTABLE, 0, unix.NFPROTO_INET, netlink.Attribute{Type: unix.NFTA_TABLE_NAME, Data: []byte(mesh.FirewallTable + "\x00")})
	if errors.Is(err, unix.ENOENT) {
		return t, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read table: %w", err)
	}
	t.exists = true
	if err := t.readChains(s); err != nil {
		return nil, fmt.Errorf("read chains: %w", err)
	}
	if err := t.readSets(s); err != nil {
		t.chains = map[string]string{"unreadable: " + err.Error(): ""}
	}
	return t, nil
}

func (t *table) readChains(s *socket) error {
	msgs, err := s.ask(unix.NFT_MSG_GETCHAIN, netlink.Dump, unix.NFPROTO_INET)
	if err != nil {
		return err
	}
	for _, m := range msgs {
		c, err := readChain(m)
		if err != nil {
			return err
		}
		if c.table != mesh.FirewallTable {
			continue
		}
		t.chains[c.name] = ""
		if c.hooked {
			t.chains[c.name] = fmt.Sprintf("%s hook %d priority %d policy %d", c.kind, c.hook, c.priority, c.policy)
		}
	}
	return t.readRules(s)
}

// listedChain is one of anybody's. What stands behind hooked is only of those that
// are: the kernel's NF_INET_ and NF_ numbers.
type listedChain struct {
	table, name, kind string
	hooked            bool
	hook, policy      uint32
	priority          int32
}

func readChain(m netlink.Message) (c listedChain, err error) {
	err = each(m, func(ad *netlink.AttributeDecoder) {
		switch ad.Type() {
		case unix.NFTA_CHAIN_TABLE:
			c.table = ad.String()
		case unix.NFTA_CHAIN_NAME:
			c.name = ad.String()
		case unix.NFTA_CHAIN_TYPE:
			c.kind = ad.String()
		case unix.NFTA_CHAIN_POLICY:
			c.policy = ad.Uint32()
		case unix.NFTA_CHAIN_HOOK:
			c.hooked = true
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					switch ad.Type() {
					case unix.NFTA_HOOK_HOOKNUM:
						c.hook = ad.Uint32()
					case unix.NFTA_HOOK_PRIORITY:
						c.priority = int32(ad.Uint32())
					}
				}
				return ad.Err()
			})
		}
	})
	return c, err
}

// readRules adds the comments of the rules to their chains.
func (t *table) readRules(s *socket) error {
	msgs, err := s.ask(unix.NFT_MSG_GETRULE, netlink.Dump, unix.NFPROTO_INET, netlink.Attribute{Type: unix.NFTA_RULE_TABLE, Data: []byte(mesh.FirewallTable + "\x00")})
	if err != nil {
		return err
	}
	for _, m := range msgs {
		var in, chain, comment string
		err := each(m, func(ad *netlink.AttributeDecoder) {
			switch ad.Type() {
			case unix.NFTA_RULE_TABLE:
				in = ad.String()
			case unix.NFTA_RULE_CHAIN:
				chain = ad.String()
			case unix.NFTA_RULE_USERDATA:
				comment, _ = userdata.GetString(ad.Bytes(), ruleComment)
			}
		})
		if err != nil {
			return err
		}
		if in == mesh.FirewallTable {
			t.chains[chain] += "\n" + comment
		}
	}
	return nil
}

func (t *table) readSets(s *socket) error {
	msgs, err := s.ask(unix.NFT_MSG_GETSET, netlink.Dump, unix.NFPROTO_INET, netlink.Attribute{Type: unix.NFTA_SET_TABLE, Data: []byte(mesh.FirewallTable + "\x00")})
	if err != nil {
		return err
	}
	for _, m := range msgs {
		var in, name string
		var flags, keyBytes uint32
		err := each(m, func(ad *netlink.AttributeDecoder) {
			switch ad.Type() {
			case unix.NFTA_SET_TABLE:
				in = ad.String()
			case unix.NFTA_SET_NAME:
				name = ad.String()
			case unix.NFTA_SET_FLAGS:
				flags = ad.Uint32()
			case unix.NFTA_SET_KEY_LEN:
				keyBytes = ad.Uint32()
			}
		})
		if err != nil {
			return err
		}
		if in == mesh.FirewallTable {
			t.sets[name] = setSignature(flags&unix.NFT_SET_MAP != 0, flags&unix.NFT_SET_INTERVAL != 0, int(keyBytes))
		}
	}
	for name, signature := range t.sets {
		if spec, ok := specOf(name); ok && signature == spec.signature() {
			if err := t.readElements(s, spec); err != nil {
				return fmt.Errorf("elements of %s: %w", name, err)
			}
		}
	}
	return nil
}

func (t *table) readElements(from *socket, s setSpec) error {
	list, err := from.nft.GetSetElements(&nftables.Set{Table: ours, Name: s.name})
	if err != nil {
		return err
	}
	in := make(map[element]string, len(list))
	for _, e := range list {
		value := string(e.Val)
		if s.verdict {
			value = gotoTarget(e.Val)
		}
		in[element{string(e.Key), e.IntervalEnd}] = value
	}
	t.elements[s.name] = in
	return nil
}

// gotoTarget is the chain a verdict goes to; anything else is no chain's name.
func gotoTarget(b []byte) string {
	ad, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return "?"
	}
	ad.ByteOrder = binary.BigEndian
	var code uint32
	var chain string
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_VERDICT_CODE:
			code = ad.Uint32()
		case unix.NFTA_VERDICT_CHAIN:
			chain = ad.String()
		}
	}
	if int32(code) != unix.NFT_GOTO {
		return "?"
	}
	return strings.TrimSuffix(chain, "\x00")
}

// commit does all ops in one transaction.
func (s *socket) commit(ops []op, want *table) error {
	for _, o := range ops {
		if err := o.stage(s.nft, want); err != nil {
			return fmt.Errorf("%s: %w", o, err)
		}
	}
	return s.nft.Flush()
}

func (o op) stage(c *nftables.Conn, want *table) error {
	switch o.verb {
	case "rebuild":
		return stageTable(c, want)
	case "add chain":
		stageChain(c, want.build[o.name])
		stageRules(c, want.build[o.name])
	case "delete chain":
		c.FlushChain(kernelChain(chain{name: o.name}))
		c.DelChain(kernelChain(chain{name: o.name}))
	case "flush":
		c.FlushSet(&nftables.Set{Table: ours, Name: o.name})
	case "add", "delete":
		return stageElements(c, o)
	}
	return nil
}

// stageTable takes the old table away, whatever it is, and makes ours.
func stageTable(c *nftables.Conn, want *table) error {
	c.AddTable(ours) // or there is none to delete
	c.DelTable(ours)
	c.AddTable(ours)
	for _, s := range specs {
		if err := c.AddSet(kernelSet(s), nil); err != nil {
			return err
		}
	}
	for _, name := range sorted(want.chains) {
		stageChain(c, want.build[name])
	}
	for _, name := range sorted(want.chains) {
		stageRules(c, want.build[name])
	}
	return nil
}

func kernelSet(s setSpec) *nftables.Set {
	k := &nftables.Set{Table: ours, Name: s.name, IsMap: s.isMap(), Interval: s.interval, KeyType: concat(s.key), Concatenation: len(s.key) > 1}
	switch {
	case s.verdict:
		k.DataType = nftables.TypeVerdict
	case len(s.value) > 0:
		k.DataType = concat(s.value)
	}
	return k
}

func kernelChain(ch chain) *nftables.Chain {
	k := &nftables.Chain{Table: ours, Name: ch.name}
	if ch.hook != nil {
		policy := nftables.ChainPolicyAccept
		k.Type, k.Hooknum, k.Priority, k.Policy = ch.kind, ch.hook, &ch.prio, &policy
	}
	return k
}

func stageChain(c *nftables.Conn, ch chain) { c.AddChain(kernelChain(ch)) }

func stageRules(c *nftables.Conn, ch chain) {
	for _, r := range ch.rules {
		c.AddRule(&nftables.Rule{Table: ours, Chain: kernelChain(ch), Exprs: r.exprs,
			UserData: userdata.AppendString(nil, ruleComment, r.comment())})
	}
}

func stageElements(c *nftables.Conn, o op) error {
	spec, _ := specOf(o.name)
	set := kernelSet(spec)
	for rest := o.elements; len(rest) > 0; {
		n := min(chunk, len(rest))
		list := make([]nftables.SetElement, n)
		for i, e := range rest[:n] {
			list[i] = nftables.SetElement{Key: []byte(e.key), IntervalEnd: e.end}
			switch {
			case o.verb == "delete" && !spec.shared: // the key is enough
			case spec.verdict:
				list[i].VerdictData = &expr.Verdict{Kind: expr.VerdictGoto, Chain: e.value}
			case len(spec.value) > 0:
				list[i].Val = []byte(e.value)
			}
		}
		change := c.SetAddElements
		if o.verb == "delete" {
			change = c.SetDeleteElements
			// The plugin may have been first. Deleting what is not there would
			// undo the whole transaction; adding what is there does nothing.
			if spec.shared {
				if err := c.SetAddElements(set, list); err != nil {
					return err
				}
			}
		}
		if err := change(set, list); err != nil {
			return err
		}
		rest = rest[n:]
	}
	return nil
}
