package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/mesh"
)

func testRequest(id string) request {
	return request{
		ranges:     spans([]netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:10:244:1::/64")}),
		quarantine: 10 * time.Second,
		record: Record{ContainerID: id, IfName: "eth0", Netns: "/run/netns/" + id, BootID: "boot-a",
			Pod: PodRef{Namespace: "default", Name: id}, HostLink: HostLink(id, "eth0"), MAC: "0e:00:00:00:00:01"},
	}
}

func mustReserve(t *testing.T, s store, q request) (*held, Record) {
	t.Helper()
	h, r, _, err := s.reserve(q)
	if err != nil {
		t.Fatal(err)
	}
	return h, r
}

func TestARecordSurvivesItsWriter(t *testing.T) {
	dir := t.TempDir()
	s := openStore(dir, "meshd")
	h, want := mustReserve(t, s, testRequest("web"))
	h.release()
	pods, err := Pods(dir)
	if err != nil || len(pods) != 1 {
		t.Fatalf("Pods: %v, %v", pods, err)
	}
	got := pods[0]
	if got.Checksum == "" || got.Network != "meshd" {
		t.Errorf("read %+v", got)
	}
	got.Checksum = ""
	if got.sum() != want.sum() {
		t.Errorf("read %+v, wrote %+v", got, want)
	}
	if _, err := os.Stat(filepath.Join(dir, "meshd", "10.244.1.2,fd00:10:244:1::2,eth0,web")); err != nil {
		t.Errorf("the file's name does not say what it is: %v", err)
	}
}

func TestOneAtWorkOnAnAttachment(t *testing.T) {
	s := openStore(t.TempDir(), "meshd")
	h, r := mustReserve(t, s, testRequest("web"))
	if _, _, _, err := s.reserve(testRequest("web")); !errors.Is(err, errBusy) {
		t.Errorf("a second ADD beside the first: %v, want busy", err)
	}
	if _, err := s.hold(r.name(), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, errBusy) {
		t.Errorf("hold: %v, want busy", err)
	}
	h.release()
	h, _, _, err := s.reserve(testRequest("web"))
	if !errors.Is(err, errExists) {
		t.Fatalf("a second ADD after the first: %v, want exists", err)
	}
	if err := h.free(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.hold(r.name(), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, errGone) {
		t.Errorf("hold after free: %v, want gone", err)
	}
}

func TestAnotherBootVoidsRecords(t *testing.T) {
	s := openStore(t.TempDir(), "meshd")
	h, first := mustReserve(t, s, testRequest("old"))
	h.release()
	h, _ = mustReserve(t, s, testRequest("older"))
	if err := h.free(); err != nil {
		t.Fatal(err)
	}
	h.release()
	h, broken := mustReserve(t, s, testRequest("broken"))
	h.release()
	if err := os.Truncate(s.path(broken.name().String()), 10); err != nil {
		t.Fatal(err)
	}
	q := testRequest("new")
	q.record.BootID = "boot-b"
	h, r := mustReserve(t, s, q)
	h.release()
	if !slices.Equal(r.Addresses, first.Addresses) {
		t.Errorf("addresses %v, want the first ones %v again", r.Addresses, first.Addresses)
	}
	names, _, err := s.names()
	if err != nil || len(names) != 2 {
		t.Fatalf("records %v, %v; want the new one and the corrupt one", names, err)
	}
	for _, n := range names {
		if n.containerID != "new" && !n.corrupt {
			t.Errorf("left of the old boot: %s", n)
		}
	}
	if files, log, _, _ := s.freed(); len(files)+len(log) != 0 {
		t.Errorf("freed in the old boot: %v %v", files, log)
	}
}

func TestLeftoversOfDeadWriters(t *testing.T) {
	s := openStore(t.TempDir(), "meshd")
	h, _ := mustReserve(t, s, testRequest("a"))
	h.release()
	stale := s.path(tempPrefix + "4711")
	if err := os.WriteFile(stale, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Files of other people are none of ours.
	if err := os.WriteFile(s.path("README"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	h, r := mustReserve(t, s, testRequest("b"))
	h.release()
	if _, err := os.Stat(stale); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("half a record is still there: %v", err)
	}
	if _, err := os.Stat(s.path("README")); err != nil {
		t.Error(err)
	}
	if got := r.Addresses[0].String(); got != "10.244.1.3" {
		t.Errorf("address %s", got)
	}
}

func TestFreedIsBounded(t *testing.T) {
	for _, c := range []struct {
		name       string
		quarantine time.Duration
		times      int
		least      int
		most       int
	}{
		{"what has rested", 0, maxFreed + 2*logSlack, maxFreed, maxFreed + logSlack + 1},
		{"what rests stays", time.Hour, maxFreed + 2*logSlack, maxFreed + 2*logSlack, maxFreed + 2*logSlack},
		{"even that is bounded", time.Hour, maxResting + 2*logSlack, maxResting, maxResting + logSlack + 1},
	} {
		s := openStore(t.TempDir(), "meshd")
		q := testRequest("web")
		q.ranges, q.quarantine = q.ranges[1:], c.quarantine
		for range c.times {
			h, _, err := s.mustReserveFast(q)
			if err != nil {
				t.Fatal(err)
			}
			if err := h.free(); err != nil {
				t.Fatal(err)
			}
			h.release()
		}
		files, log, _, err := s.freed()
		if n := len(files) + len(log); err != nil || n < c.least || n > c.most {
			t.Errorf("%s: %d files and %d lines, %v; want %d to %d", c.name, len(files), len(log), err, c.least, c.most)
		}
		if len(files) != 1 {
			t.Errorf("%s: %d files: each is to be taken again", c.name, len(files))
		}
	}
}

// The file of what was given back becomes the next record, and what its name
// said stays known.
func TestAFileIsUsedAgain(t *testing.T) {
	s := openStore(t.TempDir(), "meshd")
	long := testRequest("long")
	long.record.Pod.Name = strings.Repeat("a-long-name-", 20)
	h, first := mustReserve(t, s, long)
	before, err := h.f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.free(); err != nil {
		t.Fatal(err)
	}
	h.release()
	h, second := mustReserve(t, s, testRequest("web"))
	defer h.release()
	if after, err := h.f.Stat(); err != nil || !os.SameFile(before, after) {
		t.Errorf("another file: %v, %v", after, err)
	}
	if r, err := h.read(); err != nil || r.ContainerID != "web" {
		t.Errorf("read %+v, %v", r, err)
	}
	if slices.Equal(first.Addresses, second.Addresses) {
		t.Errorf("%v again: it was forgotten that they rest", first.Addresses)
	}
	files, log, at, err := s.freed()
	if err != nil || len(files) != 0 || len(log) != 1 {
		t.Errorf("files %v, log %v, %v", files, log, err)
	}
	for _, a := range first.Addresses {
		if _, ok := at[a]; !ok {
			t.Errorf("%s is not known from before", a)
		}
	}
	if got := (pool{freedFiles: files, freedLog: log}).former(first); !slices.Equal(got, first.Addresses) {
		t.Errorf("former addresses %v, want %v", got, first.Addresses)
	}
}

func TestAFileSomebodyHoldsIsNotUsedAgain(t *testing.T) {
	s := openStore(t.TempDir(), "meshd")
	h, _ := mustReserve(t, s, testRequest("a"))
	if err := h.free(); err != nil {
		t.Fatal(err)
	}
	defer h.release() // its DEL has not ended
	next, _ := mustReserve(t, s, testRequest("b"))
	defer next.release()
	files, log, _, err := s.freed()
	if err != nil || len(files) != 1 || len(log) != 0 {
		t.Errorf("files %v, log %v, %v", files, log, err)
	}
}

// Whoever reads a record while its file becomes another one does not take that
// for damage; real damage he sees.
func TestReadWhileAFileIsUsedAgain(t *testing.T) {
	s := openStore(t.TempDir(), "meshd")
	h, r := mustReserve(t, s, testRequest("a"))
	f, err := os.Open(s.path(r.name().String()))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := h.free(); err != nil {
		t.Fatal(err)
	}
	h.release()
	next, other := mustReserve(t, s, testRequest("b"))
	defer next.release()
	if _, err := s.peekAt(r.name(), f); !errors.Is(err, errGone) {
		t.Errorf("a record that is another's now: %v", err)
	}
	if err := os.Truncate(s.path(other.name().String()), 10); err != nil {
		t.Fatal(err)
	}
	if _, err := s.peek(other.name()); !errors.Is(err, errCorrupt) {
		t.Errorf("half a record: %v", err)
	}
}

// mustReserveFast is reserve without the disk's wait.
func (s store) mustReserveFast(q request) (*held, Record, error) {
	h, r, _, err := s.reserve(q)
	return h, r, err
}

func TestDamagedRecordsAreNotTrusted(t *testing.T) {
	good := Record{ContainerID: "web", IfName: "eth0", Addresses: []netip.Addr{netip.MustParseAddr("10.244.1.2")}, BootID: "b", Since: time.Unix(1, 0).UTC()}
	text := good.encode()
	if _, err := decodeRecord(good.name(), text); err != nil {
		t.Fatal(err)
	}
	other := good
	other.ContainerID = "other"
	for name, damaged := range map[string][]byte{
		"empty":              nil,
		"truncated":          text[:len(text)/2],
		"one bit":            flip(text, 40),
		"another's":          other.encode(),
		"zeroes":             make([]byte, len(text)),
		"no checksum":        []byte(strings.Replace(string(text), good.sum(), "", 1)),
		"a field too many":   []byte(strings.Replace(string(text), "{", `{"x":1,`, 1)),
		"an address changed": []byte(strings.Replace(string(text), "10.244.1.2", "10.244.1.3", 1)),
	} {
		if r, err := decodeRecord(good.name(), damaged); !errors.Is(err, errCorrupt) {
			t.Errorf("%s: %+v, %v; want corrupt", name, r, err)
		}
	}
}

// After going back to this plugin, a record of a newer one, with fields that
// this one does not know, is as good as its own, and stays as it is.
func TestARecordOfANewerPluginIsRead(t *testing.T) {
	want := Record{ContainerID: "web", IfName: "eth0", Addresses: []netip.Addr{netip.MustParseAddr("10.244.1.2")}, BootID: "b",
		HostPorts: []mesh.HostPort{{Protocol: mesh.TCP, HostPort: 80, Port: 80}}, Since: time.Unix(1, 0).UTC()}
	text := string(want.encode())
	text = strings.Replace(text, `"port": 80`, `"port": 80, "newer": "<a>"`, 1)
	text = strings.Replace(text, "\n  \"checksum\"", "\n  \"newest\": {\"checksum\": \"x\"},\n  \"checksum\"", 1)
	if strings.Count(text, "newe") != 2 {
		t.Fatalf("no newer fields in\n%s", text)
	}
	// The newer plugin's sum: of the text without spaces, the sum left empty.
	var compact bytes.Buffer
	if err := json.Compact(&compact, []byte(text)); err != nil {
		t.Fatal(err)
	}
	old, _ := decodeChecksum(want.encode())
	sum := fmt.Sprintf("%08x", crc32.Checksum([]byte(strings.Replace(compact.String(), old, "", 1)), crc32.MakeTable(crc32.Castagnoli)))
	text = strings.Replace(text, old, sum, 1)
	got, err := decodeRecord(want.name(), []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	want.Checksum = sum
	if diff := cmp.Diff(fmt.Sprintf("%+v", want), fmt.Sprintf("%+v", got)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, damaged := range []string{"<b>", "newes_"} {
		change := map[string]string{"<b>": "<a>", "newes_": "newest"}[damaged]
		if _, err := decodeRecord(want.name(), []byte(strings.Replace(text, change, damaged, 1))); !errors.Is(err, errCorrupt) {
			t.Errorf("with %s: %v, want corrupt", damaged, err)
		}
	}
}

func decodeChecksum(text []byte) (sum string, err error) {
	var r struct{ Checksum string }
	err = json.Unmarshal(text, &r)
	return r.Checksum, err
}

// A record is written by hand, and is what encoding/json would write: of one in
// which everything is set, and of one in which nothing is.
func TestARecordIsWrittenAsJSON(t *testing.T) {
	var full Record
	fill(t, reflect.ValueOf(&full).Elem())
	full.Pod.Name = `<a> & "b" \ ` + "\u2028\n\xff"
	for _, r := range []Record{full, {}, {Pod: PodRef{UID: "u"}, Addresses: []netip.Addr{}}} {
		want, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), string(r.compact())); diff != "" {
			t.Errorf("(-json.Marshal +ours):\n%s", diff)
		}
		r.Checksum = r.sum()
		if want, err = json.MarshalIndent(r, "", "  "); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want)+"\n", string(r.encode())); diff != "" {
			t.Errorf("(-json.MarshalIndent +ours):\n%s", diff)
		}
	}
}

// fill sets every exported field to something.
func fill(t *testing.T, v reflect.Value) {
	t.Helper()
	switch v.Interface().(type) {
	case netip.Addr:
		v.Set(reflect.ValueOf(netip.MustParseAddr("fd00::2")))
		return
	case time.Time:
		v.Set(reflect.ValueOf(time.Unix(1e9, 0).UTC()))
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString("x")
	case reflect.Uint64, reflect.Uint32, reflect.Uint16:
		v.SetUint(7)
	case reflect.Int64:
		v.SetInt(8)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range v.Len() {
			fill(t, v.Index(i))
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				fill(t, v.Field(i))
			}
		}
	default:
		t.Fatalf("cannot fill a %s: teach this test", v.Type())
	}
}

// Records on disk are those of every version there was: what a sum is over may
// not change.
func TestTheChecksumStaysWhatItWas(t *testing.T) {
	const text = `{
  "containerID": "web",
  "ifname": "eth0",
  "netns": "",
  "netnsDevice": 0,
  "netnsInode": 0,
  "bootID": "b",
  "addresses": [
    "10.244.1.2"
  ],
  "hostLink": "",
  "mac": "",
  "since": "1970-01-01T00:00:01Z",
  "uptime": 0,
  "checksum": "SUM"
}
`
	r := Record{ContainerID: "web", IfName: "eth0", Addresses: []netip.Addr{netip.MustParseAddr("10.244.1.2")}, BootID: "b", Since: time.Unix(1, 0).UTC()}
	if diff := cmp.Diff(strings.Replace(text, "SUM", "3c1033b2", 1), string(r.encode())); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func flip(text []byte, at int) []byte {
	out := slices.Clone(text)
	out[at] ^= 1
	return out
}

func TestRecordNames(t *testing.T) {
	for _, n := range []recordName{
		{addresses: addrs("10.244.1.5"), ifName: "eth0", containerID: "abc"},
		{addresses: addrs("10.244.1.5", "fd00::5"), ifName: "eth0", containerID: "abc"},
		{addresses: addrs("fd00::5"), ifName: "a,b%2C", containerID: "a.b-c_d"},
		{addresses: addrs("10.244.1.5"), ifName: "10.0.0.1", containerID: "abc", corrupt: true},
	} {
		got, ok := parseRecordName(n.String())
		if !ok || got.String() != n.String() || got.ifName != n.ifName || got.corrupt != n.corrupt {
			t.Errorf("%s read as %+v, %v", n, got, ok)
		}
	}
	for _, file := range []string{"", "lock", "boot", "freed", ".tmp-1", "10.244.1.5", "10.244.1.5,eth0", "x,eth0,abc", "10.244.1.5,,abc", "1.1.1.1,2.2.2.2,3.3.3.3,eth0,abc"} {
		if n, ok := parseRecordName(file); ok {
			t.Errorf("%q is no record, read as %+v", file, n)
		}
	}
}

func addrs(s ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func FuzzRecord(f *testing.F) {
	good := Record{ContainerID: "web", IfName: "eth0", Addresses: addrs("10.244.1.2", "fd00::2"), Since: time.Unix(1, 0).UTC()}
	f.Add(good.name().String(), good.encode())
	f.Add("10.244.1.5,a%2Cb,c.corrupt", []byte("{}"))
	f.Add("", []byte("null"))
	f.Fuzz(func(t *testing.T, file string, text []byte) {
		n, ok := parseRecordName(file)
		if !ok {
			return
		}
		if again, ok := parseRecordName(n.String()); !ok || again.String() != n.String() {
			t.Errorf("%q read as %s, then as %s", file, n, again)
		}
		r, err := decodeRecord(n, text)
		if err != nil {
			if !errors.Is(err, errCorrupt) {
				t.Errorf("error %v is not errCorrupt", err)
			}
			return
		}
		if r.name().String() != strings.TrimSuffix(n.String(), corruptSuffix) {
			t.Errorf("took a record of %s for one of %s", r.name(), n)
		}
	})
}

// The log may hold anything: half a line of one that was killed, or worse.
func FuzzFreedLog(f *testing.F) {
	f.Add([]byte("00000000000000000005,10.244.1.5,fd00::5,eth0,web\n00000000000000000009,10.24"))
	f.Add([]byte("-1,10.244.1.5,eth0,web\n,\n\x00"))
	f.Fuzz(func(t *testing.T, text []byte) {
		s := openStore(t.TempDir(), "meshd")
		if err := os.MkdirAll(s.path(freedDir), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(s.logPath(), text, 0o600); err != nil {
			t.Fatal(err)
		}
		h, r := mustReserve(t, s, testRequest("new"))
		defer h.release()
		if len(r.Addresses) != 2 {
			t.Errorf("addresses %v", r.Addresses)
		}
		if p, err := s.pool(nil, nil, 0); err != nil || slices.ContainsFunc(r.Addresses, func(a netip.Addr) bool { _, held := p.held[a]; return !held }) {
			t.Errorf("%v is not held: %v, %v", r.Addresses, p.held, err)
		}
	})
}
