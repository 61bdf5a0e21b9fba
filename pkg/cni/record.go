package cni

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"strings"
	"time"

	"meshd.dev/pkg/mesh"
)

// Record is one attachment as its file has it.
type Record struct {
	// Network the attachment belongs to: the folder its file is in.
	Network     string `json:"-"`
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifname"`
	// Netns is the path the runtime gave; device and inode say which
	// namespace was there then.
	Netns       string `json:"netns"`
	NetnsDevice uint64 `json:"netnsDevice"`
	NetnsInode  uint64 `json:"netnsInode"`
	// BootID of the kernel that holds the link (random/boot_id).
	BootID string `json:"bootID"`
	// Pod is empty when the runtime named none in CNI_ARGS.
	Pod PodRef `json:"pod,omitzero"`
	// Addresses of the pod, IPv4 first.
	Addresses []netip.Addr `json:"addresses"`
	// HostLink is the host's end of the veth pair.
	HostLink string `json:"hostLink"`
	// MAC of the pod's end.
	MAC string `json:"mac"`
	// Table of the firewall in which the pod is admitted; empty: in none.
	Table string `json:"table,omitempty"`
	// HostPorts that lead to the pod.
	HostPorts []mesh.HostPort `json:"hostPorts,omitempty"`
	// ToPod and FromPod limit the rate.
	ToPod   limit `json:"toPod,omitzero"`
	FromPod limit `json:"fromPod,omitzero"`
	// HostLocal is host-local's file from which the attachment was taken over.
	HostLocal string `json:"hostLocal,omitempty"`
	// Since is when the attachment was made, for people to read. Uptime is
	// the same in CLOCK_BOOTTIME, for arithmetic: it never goes back.
	Since  time.Time     `json:"since"`
	Uptime time.Duration `json:"uptime"`
	// Checksum is the CRC-32 (Castagnoli) of the record's text, with no spaces
	// between tokens and an empty checksum. It is the last field: others go
	// before it, so that older plugins can tell a sound record.
	Checksum string `json:"checksum"`

	// corrupt: nothing is known but what the file's name says.
	corrupt bool
	// former addresses of the same attachment in this boot: what the firewall
	// may still have of them has to go.
	former []netip.Addr
}

// PodRef names the Kubernetes pod behind an attachment.
type PodRef struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`
}

// HostLink names the host's end of an attachment's veth pair: "msh" and twelve
// hex digits of a hash, as much as an interface name takes.
func HostLink(containerID, ifName string) string {
	h := attachmentHash(containerID, ifName)
	return mesh.PodLinkPrefix + hex.EncodeToString(h[:6])
}

// podMAC is locally administered and the same each time an attachment is made.
// It shares its digits with the link's name.
func podMAC(containerID, ifName string) [6]byte {
	h := attachmentHash(containerID, ifName)
	return [6]byte{0x0e, h[0], h[1], h[2], h[3], h[4]}
}

// attachmentHash need not withstand an attacker: container IDs are the
// runtime's, and a name that is taken already is noticed. The crypto packages
// would make every start of the plugin longer.
func attachmentHash(containerID, ifName string) (folded [8]byte) {
	h := fnv.New128a()
	h.Write([]byte(containerID + "\x00" + ifName))
	sum := h.Sum(nil)
	for i := range folded {
		folded[i] = sum[i] ^ sum[i+8]
	}
	return folded
}

// maxAlias is IFALIASZ without its end.
const maxAlias = 255

// alias is what "ip link" shows beside the host's end. It says enough to know
// whose link it is without the record; a very long name of a pod is cut.
func (r Record) alias() string {
	s := strings.TrimRight(fmt.Sprintf("%s %s %s/%s", r.ContainerID, r.IfName, r.Pod.Namespace, r.Pod.Name), "/ ")
	return s[:min(len(s), maxAlias)]
}

// parseAlias reads back what alias wrote.
func parseAlias(s string) (Record, bool) {
	fields := strings.Split(s, " ") // an interface name has none
	if len(fields) < 2 || fields[0] == "" || fields[1] == "" {
		return Record{}, false
	}
	r := Record{ContainerID: fields[0], IfName: fields[1], HostLink: HostLink(fields[0], fields[1])}
	if len(fields) > 2 {
		r.Pod.Namespace, r.Pod.Name, _ = strings.Cut(fields[2], "/")
	}
	return r, true
}

// crc32c is CRC-32 (Castagnoli). The tables that hash/crc32 makes for it take
// longer than a record without them: they are a thirtieth of an ADD.
func crc32c(text []byte) uint32 {
	const reversed = 0x82f63b78
	sum := ^uint32(0)
	for _, b := range text {
		sum ^= uint32(b)
		for range 8 {
			sum = sum>>1 ^ reversed&-(sum&1)
		}
	}
	return ^sum
}

// compact is json.Marshal(r), byte by byte, at a third of its price: a plugin
// writes one record in its life, and encoding/json takes 0.15 ms to learn the
// type before it writes the first.
func (r Record) compact() []byte {
	var o object
	o.add("containerID", r.ContainerID)
	o.add("ifname", r.IfName)
	o.add("netns", r.Netns)
	o.add("netnsDevice", r.NetnsDevice)
	o.add("netnsInode", r.NetnsInode)
	o.add("bootID", r.BootID)
	if r.Pod != (PodRef{}) {
		o.add("pod", r.Pod.compact())
	}
	o.add("addresses", addrTexts(r.Addresses))
	o.add("hostLink", r.HostLink)
	o.add("mac", r.MAC)
	if r.Table != "" {
		o.add("table", r.Table)
	}
	if len(r.HostPorts) > 0 {
		o.add("hostPorts", r.HostPorts)
	}
	if r.ToPod != (limit{}) {
		o.add("toPod", r.ToPod)
	}
	if r.FromPod != (limit{}) {
		o.add("fromPod", r.FromPod)
	}
	if r.HostLocal != "" {
		o.add("hostLocal", r.HostLocal)
	}
	o.add("since", r.Since)
	o.add("uptime", int64(r.Uptime))
	o.add("checksum", r.Checksum)
	return o.end()
}

func (p PodRef) compact() json.RawMessage {
	var o object
	for _, f := range []struct{ name, value string }{{"namespace", p.Namespace}, {"name", p.Name}, {"uid", p.UID}} {
		if f.value != "" {
			o.add(f.name, f.value)
		}
	}
	return o.end()
}

func addrTexts(addrs []netip.Addr) []string {
	if addrs == nil {
		return nil
	}
	texts := make([]string, len(addrs))
	for i, a := range addrs {
		texts[i] = a.String()
	}
	return texts
}

// object is JSON's, written field by field.
type object []byte

func (o *object) add(name string, value any) {
	text, _ := json.Marshal(value) // plain values: cannot fail
	*o = append(append(append(*o, `,"`...), name...), `":`...)
	*o = append(*o, text...)
}

func (o *object) end() []byte {
	if len(*o) == 0 {
		return []byte("{}")
	}
	(*o)[0] = '{'
	return append(*o, '}')
}

func (r Record) sum() string {
	r.Checksum = ""
	return fmt.Sprintf("%08x", crc32c(r.compact()))
}

// encode is the content of r's file.
func (r Record) encode() []byte {
	r.Checksum = ""
	text := r.compact()
	empty := len(text) - len(`"}`)
	sum := fmt.Appendf(nil, `%08x"}`, crc32c(text))
	var b bytes.Buffer
	_ = json.Indent(&b, append(text[:empty], sum...), "", "  ") // of our own making: cannot fail
	b.WriteByte('\n')
	return b.Bytes()
}

// errCorrupt marks records that cannot be trusted.
var errCorrupt = errors.New("record is corrupt")

// textSum is sum for a text, whose last field has to be the checksum: it counts
// fields that a newer plugin wrote and this one does not know.
func textSum(text []byte, checksum string) (string, error) {
	var b bytes.Buffer
	if err := json.Compact(&b, text); err != nil {
		return "", err
	}
	body, ok := bytes.CutSuffix(b.Bytes(), []byte(`"checksum":"`+checksum+`"}`))
	if !ok {
		return "", errors.New("its last field is not checksum")
	}
	return fmt.Sprintf("%08x", crc32c(append(body, `"checksum":""}`...))), nil
}

// decodeRecord reads a record's content. Whatever is not exactly what encode,
// of this version or another, wrote for an attachment of that name is
// errCorrupt. Fields that are not known are passed over; no record is ever
// written anew, and so they stay.
func decodeRecord(name recordName, text []byte) (Record, error) {
	var r Record
	if err := json.Unmarshal(text, &r); err != nil {
		return Record{}, fmt.Errorf("%w: %w", errCorrupt, err)
	}
	sum, err := textSum(text, r.Checksum)
	if err != nil {
		return Record{}, fmt.Errorf("%w: %w", errCorrupt, err)
	}
	if r.Checksum != sum {
		return Record{}, fmt.Errorf("%w: checksum %q, want %s", errCorrupt, r.Checksum, sum)
	}
	if have := r.name().String(); have != name.String() {
		return Record{}, fmt.Errorf("%w: it is about %s", errCorrupt, have)
	}
	return r, nil
}

// record is what a name alone says, for content that cannot be trusted.
func (n recordName) record(network string) Record {
	return Record{Network: network, ContainerID: n.containerID, IfName: n.ifName, Addresses: n.addresses,
		HostLink: HostLink(n.containerID, n.ifName), Table: mesh.FirewallTable, corrupt: true}
}

func (r Record) name() recordName {
	return recordName{addresses: r.Addresses, ifName: r.IfName, containerID: r.ContainerID}
}

// recordName is a record's file name taken apart.
type recordName struct {
	addresses   []netip.Addr
	ifName      string
	containerID string
	// corrupt is set for a record that was set aside.
	corrupt bool
}

const (
	corruptSuffix = ".corrupt"
	// maxContainerID keeps file names under the 255 bytes a file system
	// takes, with room for several addresses. Runtimes use 64.
	maxContainerID = 128
	// maxAddresses an attachment can have.
	maxAddresses = 2
)

// An interface name may hold the comma that parts the fields. Hardly any does,
// and a strings.Replacer is a thirtieth of a millisecond in the making.
func escapeIfName(s string) string {
	if !strings.ContainsAny(s, "%,") {
		return s
	}
	return strings.NewReplacer("%", "%25", ",", "%2C").Replace(s)
}

func unescapeIfName(s string) string {
	if !strings.Contains(s, "%") {
		return s
	}
	return strings.NewReplacer("%25", "%", "%2C", ",").Replace(s)
}

func (n recordName) String() string {
	var b strings.Builder
	for _, a := range n.addresses {
		b.WriteString(a.String())
		b.WriteByte(',')
	}
	b.WriteString(escapeIfName(n.ifName))
	b.WriteByte(',')
	b.WriteString(n.containerID)
	if n.corrupt {
		b.WriteString(corruptSuffix)
	}
	return b.String()
}

// parseRecordName says whether a file's name is a record's.
func parseRecordName(file string) (recordName, bool) {
	var n recordName
	file, n.corrupt = strings.CutSuffix(file, corruptSuffix)
	fields := strings.Split(file, ",")
	last := len(fields) - 1
	if last < 2 || last-1 > maxAddresses {
		return recordName{}, false
	}
	for _, f := range fields[:last-1] {
		a, err := netip.ParseAddr(f)
		if err != nil || a.Zone() != "" {
			return recordName{}, false
		}
		n.addresses = append(n.addresses, a)
	}
	n.ifName, n.containerID = unescapeIfName(fields[last-1]), fields[last]
	return n, n.ifName != "" && n.containerID != ""
}

// is says whether the record belongs to an attachment.
func (n recordName) is(containerID, ifName string) bool {
	return n.containerID == containerID && n.ifName == ifName
}
