package host

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"meshd.dev/test/netlab"
)

// TestSettings compares every setting of the kernel with what the documentation
// says that meshd changes: no other one, and these as it says.
func TestSettings(t *testing.T) {
	tell(t, newWorld(t), []step{
		{"two machines", boot},
		{"all settings of one are noted", settingsBefore},
		{"a cluster of them, and pods", start},
		{"only what pkg/README.md lists has changed", settingsAfter},
		{"after meshd cleanup, only what it says stays", settingsCleaned},
	})
}

// restless are settings that change by themselves, or with whatever else the
// host does: counters, the random numbers, the next process number.
var restless = regexp.MustCompile(`^(fs/(dentry-state|file-nr|inode-nr|inode-state|aio-nr|quota/.*|binfmt_misc/.*)|kernel/(random/.*|ns_last_pid|pty/nr|perf_.*|sched_domain/.*|tainted|cap_last_cap|usermodehelper/.*|keys/.*)|` +
	`net/netfilter/nf_conntrack_count|net/ipv[46]/conf/[^/]+/stable_secret|net/ipv4/tcp_fastopen_key|vm/(stat_refresh|drop_caches|compact_memory|.*_ratio|.*_bytes|nr_.*|min_free_kbytes|lowmem_reserve_ratio))$`)

// settings of a machine, by path below /proc/sys.
func settings(ctx context.Context, m *netlab.Machine) (map[string]string, error) {
	out, err := m.Run(ctx, "sh", "-c", "cd /proc/sys && grep -rs . kernel net fs vm user; true")
	if err != nil {
		return nil, err
	}
	all := map[string]string{}
	for line := range strings.Lines(out) {
		if file, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ":"); ok && !restless.MatchString(file) {
			all[file] = strings.TrimPrefix(all[file]+"\n"+strings.Join(strings.Fields(value), " "), "\n")
		}
	}
	if len(all) < 500 {
		return nil, fmt.Errorf("only %d settings could be read", len(all))
	}
	return all, nil
}

// A setting as it is documented: name may have * for a part of it, and a
// condition makes it one that need not be.
type documented struct {
	pattern, value string
	conditional    bool
	stays          bool
}

// documentation reads the table of settings in pkg/README.md.
func documentation() ([]documented, error) {
	text, err := os.ReadFile(filepath.Join("..", "..", "pkg", "README.md"))
	if err != nil {
		return nil, err
	}
	row := regexp.MustCompile("(?m)^\\| `(net\\.[^`]+)` \\| ([0-9-]+) \\|(.*)\\|$")
	var all []documented
	for _, m := range row.FindAllStringSubmatch(string(text), -1) {
		all = append(all, documented{strings.ReplaceAll(m[1], ".", "/"), m[2], strings.Contains(m[3], "only "), strings.Contains(m[3], "stays")})
	}
	if len(all) < 10 {
		return nil, fmt.Errorf("pkg/README.md has only %d settings in its table", len(all))
	}
	return all, nil
}

func find(docs []documented, file string) (documented, bool) {
	i := slices.IndexFunc(docs, func(d documented) bool { ok, _ := path.Match(d.pattern, file); return ok })
	if i < 0 {
		return documented{}, false
	}
	return docs[i], true
}

// perLink is the setting of a link; new links begin with those of default.
var perLink = regexp.MustCompile(`^(net/ipv[46]/(?:conf|neigh)/)([^/]+)(/.*)$`)

// kernels are what the kernel itself sets on a link of ours, because of its MTU
// or because it has no addresses of a lower layer.
var kernels = regexp.MustCompile(`^net/ipv6/conf/(mesh0[^/]*/(mtu|accept_dad|use_tempaddr)|msh[0-9a-f]+/mtu)$`)

// undocumented says what is another than before and in no row, or not as its
// row says.
func undocumented(before, after map[string]string, docs []documented, may func(documented) bool) error {
	var wrong []string
	for _, file := range slices.Sorted(maps.Keys(after)) {
		was, there := before[file]
		if m := perLink.FindStringSubmatch(file); m != nil && !there {
			if was, there = after[m[1]+"default"+m[3]]; !there { // the host's alone has it
				was = after[m[1]+"eth0"+m[3]]
			}
		}
		d, ok := find(docs, file)
		switch value := after[file]; {
		case ok && may(d):
			if value != d.value && (value != was || !d.conditional) {
				wrong = append(wrong, fmt.Sprintf("%s is %s, pkg/README.md says %s", file, value, d.value))
			}
		case value != was && !kernels.MatchString(file):
			wrong = append(wrong, fmt.Sprintf("%s was %q, is %q, and pkg/README.md has nothing of it", file, was, value))
		}
	}
	for _, file := range slices.Sorted(maps.Keys(before)) {
		if _, there := after[file]; !there && perLink.FindStringSubmatch(file) == nil {
			wrong = append(wrong, file+" is gone")
		}
	}
	return errors.Join(func() (errs []error) {
		for _, w := range wrong {
			errs = append(errs, errors.New(w))
		}
		return errs
	}()...)
}

// settingsBefore sets those that meshd changes to what a kernel begins with: a
// machine of the lab has the host's.
func settingsBefore(ctx context.Context, w *world) (string, error) {
	_, err := w.m2().Run(ctx, "sysctl", "-w", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0", "net.ipv4.conf.all.send_redirects=1", "net.ipv4.ip_local_reserved_ports=")
	if err != nil {
		return "", err
	}
	w.settings, err = settings(ctx, w.m2())
	return fmt.Sprintf("%d settings", len(w.settings)), err
}

func settingsAfter(ctx context.Context, w *world) (string, error) {
	docs, err := documentation()
	if err != nil {
		return "", err
	}
	after, err := settings(ctx, w.m2())
	if err != nil {
		return "", err
	}
	for _, d := range docs {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(after)), func(file string) bool { ok, _ := path.Match(d.pattern, file); return ok }) {
			err = errors.Join(err, fmt.Errorf("no setting here is %s", d.pattern))
		}
	}
	return fmt.Sprintf("%d settings, %d rows", len(after), len(docs)),
		errors.Join(err, undocumented(w.settings, after, docs, func(documented) bool { return true }))
}

func settingsCleaned(ctx context.Context, w *world) (string, error) {
	if err := netlab.Kill(ctx, w.Meshd("m2")); err != nil {
		return "", err
	}
	if _, err := w.m2().Run(ctx, "meshd", "cleanup", "--all", "--force"); err != nil {
		return "", err
	}
	docs, err := documentation()
	if err != nil {
		return "", err
	}
	after, err := settings(ctx, w.m2())
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d settings", len(after)), undocumented(w.settings, after, docs, func(d documented) bool { return d.stays })
}
