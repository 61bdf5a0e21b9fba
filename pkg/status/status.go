// Package status says what is up, what is not, why, and what to do: named
// checks that the parts of a daemon keep current, the Document they make up,
// and the socket on which meshctl reads it.
package status

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Check is one thing that is healthy or not. An unhealthy one has a Reason a
// person understands and a Next step a person can take.
type Check struct {
	// Name is part/thing, for instance "datapath/routes" or "tunnel/node2".
	Name    string `json:"name"`
	Healthy bool   `json:"healthy"`
	Reason  string `json:"reason,omitempty"`
	Next    string `json:"next,omitempty"`
	// Note is worth knowing and no fault.
	Note  string    `json:"note,omitempty"`
	Since time.Time `json:"since"`
}

// Tunnel is the state of the WireGuard tunnel to one peer.
type Tunnel struct {
	Peer      string    `json:"peer"`
	Endpoint  string    `json:"endpoint,omitempty"`
	Handshake time.Time `json:"lastHandshake,omitzero"`
	RxBytes   int64     `json:"rxBytes"`
	TxBytes   int64     `json:"txBytes"`
	MTU       int       `json:"mtu"`
	// Backend is "kernel" or "userspace".
	Backend string `json:"backend"`
	Up      bool   `json:"up"`
	Reason  string `json:"reason,omitempty"`
	// Note is worth knowing and no fault.
	Note string `json:"note,omitempty"`
}

// Repair is something that was not as it should be and was put right.
type Repair struct {
	Time time.Time `json:"time"`
	// Part is named like a Check.
	Part string `json:"part"`
	What string `json:"what"`
	// Times it happened since the first one that is remembered.
	Times int `json:"times"`
}

// Document is the whole answer of one daemon.
type Document struct {
	Node    string    `json:"node"`
	Role    string    `json:"role"`
	Version string    `json:"version"`
	Time    time.Time `json:"time"`
	Started time.Time `json:"started"`
	Checks  []Check   `json:"checks"`
	Tunnels []Tunnel  `json:"tunnels,omitempty"`
	// Repairs of the last RepairsKept, oldest first.
	Repairs []Repair `json:"repairs,omitempty"`
}

// Healthy reports whether every check is.
func (d Document) Healthy() bool {
	return !slices.ContainsFunc(d.Checks, func(c Check) bool { return !c.Healthy })
}

// Board is where the parts of a daemon pin their checks. The zero Board is
// ready to use; a nil *Board swallows everything.
type Board struct {
	mu     sync.Mutex
	checks map[string]Check
	// repairs, oldest first.
	repairs []Repair
}

// RepairsKept is how long a repair is spoken of; of many, only the last
// maxRepairs.
const (
	RepairsKept = 10 * time.Minute
	maxRepairs  = 32
)

// Repaired notes that part was found broken and is well again.
func (b *Board) Repaired(part, what string) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	r := Repair{Time: time.Now(), Part: part, What: what, Times: 1}
	if i := slices.IndexFunc(b.repairs, func(o Repair) bool { return o.Part == part && o.What == what }); i >= 0 {
		r.Times += b.repairs[i].Times
		b.repairs = slices.Delete(b.repairs, i, i+1)
	}
	b.repairs = append(b.repairs, r)
	b.repairs = b.repairs[max(0, len(b.repairs)-maxRepairs):]
}

// Repairs that are still spoken of, oldest first.
func (b *Board) Repairs() []Repair {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.repairs = slices.DeleteFunc(b.repairs, func(r Repair) bool { return time.Since(r.Time) > RepairsKept })
	return slices.Clone(b.repairs)
}

// OK says that name is healthy.
func (b *Board) OK(name string) { b.set(Check{Name: name, Healthy: true}) }

// Note says that name is healthy, and what is worth knowing about it.
func (b *Board) Note(name, note string) { b.set(Check{Name: name, Healthy: true, Note: note}) }

// Fail says that name is not healthy, why, and what a person can do.
func (b *Board) Fail(name, reason, next string) {
	b.set(Check{Name: name, Reason: reason, Next: next})
}

// Report is OK for a nil err and Fail with its text otherwise.
func (b *Board) Report(name string, err error, next string) {
	if err == nil {
		b.OK(name)
		return
	}
	b.Fail(name, err.Error(), next)
}

// Clear takes name off the board: the thing it spoke of is no more.
func (b *Board) Clear(name string) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.checks, name)
}

func (b *Board) set(c Check) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.checks == nil {
		b.checks = map[string]Check{}
	}
	c.Since = time.Now()
	if old, ok := b.checks[c.Name]; ok && old.Healthy == c.Healthy {
		c.Since = old.Since
	}
	b.checks[c.Name] = c
}

// Checks in order of name.
func (b *Board) Checks() []Check {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	checks := make([]Check, 0, len(b.checks))
	for _, c := range b.checks {
		checks = append(checks, c)
	}
	slices.SortFunc(checks, func(a, b Check) int { return cmp.Compare(a.Name, b.Name) })
	return checks
}

// Serve answers on the Unix socket at path until ctx ends: GET of a key of
// pages yields the JSON of what its function returns. The socket is mode 0600
// in a folder of mode 0700; a stale one is replaced.
func Serve(ctx context.Context, path string, pages map[string]func() any) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("status socket: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("status socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return fmt.Errorf("status socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return fmt.Errorf("status socket: %w", err)
	}
	mux := http.NewServeMux()
	for page, get := range pages {
		if !strings.Contains(page, " ") {
			page = "GET " + page
		}
		mux.HandleFunc(page, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(get())
		})
	}
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, MaxHeaderBytes: 64 << 10}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("status socket %s: %w", path, err)
	}
	return nil
}

// Fetch reads page from the socket at path into v. A page that changes
// something has its method in front of it: "POST /keys/rotate".
func Fetch(ctx context.Context, path, page string, v any) error {
	method, at, found := strings.Cut(page, " ")
	if !found {
		method, at = http.MethodGet, page
	}
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}}}
	req, err := http.NewRequestWithContext(ctx, method, "http://meshd"+at, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("meshd does not run on this machine: nobody answers on %s", path)
	}
	if err != nil {
		return fmt.Errorf("ask meshd on %s: %w", path, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("ask meshd on %s for %s: %s", path, page, resp.Status)
	}
	if err := json.NewDecoder(resp.Body).Decode(v); err != nil {
		return fmt.Errorf("answer of meshd on %s: %w", path, err)
	}
	return nil
}
