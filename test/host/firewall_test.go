package host

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"meshd.dev/test/cluster"
	"meshd.dev/test/netlab"
)

func TestFirewalls(t *testing.T) {
	tell(t, newWorld(t), []step{
		{"two machines", boot},
		{"one with rules of nft and of both iptables", theirRules},
		{"a cluster of them, and pods", start},
		{"their rules are as before", rulesStand},
		{"nft flush ruleset: ours are back, pods go on", flushed},
		{"firewalld starts: pods are cut off, and status says so", firewalldStarts},
		{"with what the documentation says pods go on", firewalldMended},
		{"firewall-cmd --reload: ours stay, pods go on", firewalldReloads},
		{"firewalld's rules are as without meshd", firewalldStands},
		{"iptables -P FORWARD DROP cuts pods off, and status says so", forwardDrop},
		{"what status says mends it", forwardMended},
		{"meshd cleanup leaves theirs alone, and nothing of ours", cleanedUp},
	})
}

// adminRules are what somebody may have on a machine.
const adminRules = `set -e
nft -f - <<END
table inet admin {
	set friends { type ipv4_addr; elements = { 192.0.2.1, 192.0.2.2 } }
	chain input { type filter hook input priority 10; policy accept; ip saddr @friends counter accept comment "friends"; tcp dport 2222 drop; }
	chain forward { type filter hook forward priority 10; policy accept; ip saddr 192.0.2.77 drop; }
}
END
for t in iptables-nft iptables-legacy ip6tables-nft ip6tables-legacy; do
	$t -N ADMIN
	$t -A ADMIN -p tcp --dport 2223 -j DROP
	$t -A INPUT -j ADMIN
	$t -A FORWARD -p udp --dport 2224 -j DROP
	$t -t nat -A POSTROUTING -p tcp --dport 2225 -j MASQUERADE
	$t -t mangle -A PREROUTING -p tcp --dport 2226 -j MARK --set-mark 7
done`

// counts are what rules have counted, and comments with a time.
var counts = regexp.MustCompile(`\[[0-9]+:[0-9]+\]|counter packets [0-9]+ bytes [0-9]+|(?m:^# .*$)`)

// theirs is every rule on m2 that is not ours.
func (w *world) theirs(ctx context.Context) (string, error) {
	out, err := w.run(ctx, "sh", "-c", `iptables-legacy-save; ip6tables-legacy-save
for table in $(nft list tables | sed 's/^table //;s/ /_/' | grep -v '^inet_meshd$'); do nft -s list table $(echo $table | tr _ ' '); done`)
	return counts.ReplaceAllString(out, ""), err
}

func theirRules(ctx context.Context, w *world) (string, error) {
	if _, err := w.run(ctx, "sh", "-c", adminRules); err != nil {
		return "", err
	}
	var err error
	w.before, err = w.theirs(ctx)
	if err == nil && strings.Count(w.before, "2223") != 4 {
		err = fmt.Errorf("want the rules of four iptables:\n%s", w.before)
	}
	return fmt.Sprintf("%d lines", strings.Count(w.before, "\n")), err
}

func rulesStand(ctx context.Context, w *world) (string, error) {
	now, err := w.theirs(ctx)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d lines", strings.Count(now, "\n")), differ(w.before, now)
}

// again waits until all of ours is as in an earlier picture.
func (w *world) again(ctx context.Context, before string) error {
	return cluster.Until(ctx, func(ctx context.Context) error {
		after, err := picture(ctx, w.m2())
		if err != nil {
			return err
		}
		return differ(before, after)
	})
}

// flushed is what a restarted nftables.service does.
func flushed(ctx context.Context, w *world) (string, error) {
	before, err := picture(ctx, w.m2())
	if err != nil {
		return "", err
	}
	began := time.Now()
	silence, _, err := w.heard(ctx, func(ctx context.Context) error {
		if _, err := w.m2().Run(ctx, "nft", "flush", "ruleset"); err != nil {
			return err
		}
		began = time.Now()
		return w.again(ctx, before)
	})
	return fmt.Sprintf("seen whole after %s; longest silence of a connection %s", cluster.Short(time.Since(began)), silence), err
}

// firewalldRules are those manifests/README.md has.
var firewalldRules = [][]string{
	{"--permanent", "--add-port=51820-51821/udp", "--add-port=51820/tcp"},
	{"--permanent", "--zone=trusted", "--add-interface=mesh0"},
	{"--permanent", "--zone=trusted", "--add-source=10.244.0.0/16", "--add-source=fd00:10:244::/48"},
}

func (w *world) firewallCmd(ctx context.Context, args ...string) (string, error) {
	return w.run(ctx, append([]string{"firewall-cmd"}, args...)...)
}

// reload has firewalld make its rules anew. On a busy host that takes longer
// than firewall-cmd waits for the answer (25 s); then it says its state again
// when it is done.
func (w *world) reload(ctx context.Context) error {
	_, err := w.firewallCmd(ctx, "--reload")
	if err == nil || !strings.Contains(err.Error(), "Did not receive a reply") {
		return err
	}
	return w.until(ctx, "firewalld", func(ctx context.Context) error {
		_, err := w.firewallCmd(ctx, "--state")
		return err
	})
}

func firewalldStarts(ctx context.Context, w *world) (string, error) {
	if err := w.start(ctx, "firewalld", "firewalld", "--nofork", "--nopid"); err != nil {
		return "", err
	}
	err := w.until(ctx, "firewalld", func(ctx context.Context) error {
		state, err := w.firewallCmd(ctx, "--state")
		if err == nil && strings.TrimSpace(state) != "running" {
			err = errors.New(state)
		}
		return err
	})
	if err != nil {
		return "", err
	}
	return w.statusSaysDropped(ctx, "filter_FORWARD of table inet firewalld")
}

func firewalldMended(ctx context.Context, w *world) (string, error) {
	for _, args := range firewalldRules {
		if _, err := w.firewallCmd(ctx, args...); err != nil {
			return "", err
		}
	}
	if err := w.reload(ctx); err != nil {
		return "", err
	}
	if err := w.podsTalk(ctx); err != nil {
		return "", err
	}
	if _, err := w.StatusHealthy(ctx, []string{"m1", "m2"}); err != nil {
		return "", err
	}
	version, err := w.firewallCmd(ctx, "--version")
	return "firewalld " + strings.TrimSpace(version) + "; pods of both machines begin connections with each other", err
}

// statusSaysDropped waits until meshctl status names another firewall.
func (w *world) statusSaysDropped(ctx context.Context, by string) (string, error) {
	var said string
	err := cluster.Until(ctx, func(ctx context.Context) error {
		if w.fetch(ctx, "m1", "m2") == nil {
			return errors.New("a pod got through a machine that drops what it forwards")
		}
		status, _ := w.m2().Run(ctx, "meshctl", "status") // not healthy: it ends with 1
		for line := range strings.Lines(status) {
			if strings.Contains(line, "another firewall of this machine drops what is forwarded") {
				said = strings.TrimSpace(line)
			}
		}
		if !strings.Contains(said, by) || !strings.Contains(status, "iptables -I FORWARD -i msh+ -j ACCEPT") {
			return fmt.Errorf("meshctl status does not say who drops and what to do:\n%s", status)
		}
		return nil
	})
	return said, err
}

// podsTalk has each pod fetch from the other.
func (w *world) podsTalk(ctx context.Context) error {
	return cluster.Until(ctx, func(ctx context.Context) error {
		for _, pair := range [][2]string{{"m1", "m2"}, {"m2", "m1"}} {
			if err := w.fetch(ctx, pair[0], pair[1]); err != nil {
				return err
			}
		}
		return nil
	})
}

func (w *world) fetch(ctx context.Context, a, b string) error {
	from, to, err := w.pair(ctx, a, b)
	if err != nil {
		return err
	}
	_, _, err = w.Fetch(ctx, from, "http://"+to.Status.PodIP+":8080/", time.Second)
	return err
}

func (w *world) pair(ctx context.Context, a, b string) (from, to *corev1.Pod, err error) {
	if from, err = w.PodOn(ctx, "everywhere", a); err != nil {
		return nil, nil, err
	}
	to, err = w.PodOn(ctx, "everywhere", b)
	return from, to, err
}

func firewalldReloads(ctx context.Context, w *world) (string, error) {
	before, err := w.firewalld(ctx)
	if err != nil {
		return "", err
	}
	note, err := w.undisturbed(ctx, w.reload)
	if err != nil {
		return "", err
	}
	after, err := w.firewalld(ctx)
	if err != nil {
		return "", err
	}
	if err := differ(before, after); err != nil {
		return "", fmt.Errorf("firewalld's own rules: %w", err)
	}
	return note, w.podsTalk(ctx)
}

// firewalld is what firewalld has in the kernel.
func (w *world) firewalld(ctx context.Context) (string, error) {
	return w.m2().Run(ctx, "nft", "-s", "list", "table", "inet", "firewalld")
}

// firewalldStands compares with what it makes where there is no meshd.
func firewalldStands(ctx context.Context, w *world) (string, error) {
	here, err := w.firewalld(ctx)
	if err != nil {
		return "", err
	}
	if err := w.stop(ctx, "firewalld"); err != nil {
		return "", err
	}
	there, err := w.run(ctx, "unshare", "-n", "sh", "-c", `ip link set lo up
firewalld --nofork --nopid >/dev/null 2>&1 & pid=$!
trap 'kill $pid' EXIT
for i in $(seq 300); do firewall-cmd --state >/dev/null 2>&1 && break; sleep 0.1; done
nft -s list table inet firewalld`)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d lines", strings.Count(here, "\n")), differ(there, here)
}

// forwardDrop is what Docker does to every machine it runs on.
func forwardDrop(ctx context.Context, w *world) (string, error) {
	if _, err := w.run(ctx, "iptables-nft", "-P", "FORWARD", "DROP"); err != nil {
		return "", err
	}
	return w.statusSaysDropped(ctx, "FORWARD of table ip filter (policy drop)")
}

func forwardMended(ctx context.Context, w *world) (string, error) {
	for _, way := range []string{"-i", "-o"} {
		if _, err := w.run(ctx, "iptables-nft", "-I", "FORWARD", way, "msh+", "-j", "ACCEPT"); err != nil {
			return "", err
		}
	}
	if err := w.podsTalk(ctx); err != nil {
		return "", err
	}
	return w.StatusHealthy(ctx, []string{"m1", "m2"})
}

// cleanedUp takes meshd off m2 as its documentation says.
func cleanedUp(ctx context.Context, w *world) (string, error) {
	before, err := w.theirs(ctx)
	if err != nil {
		return "", err
	}
	if err := netlab.Kill(ctx, w.Meshd("m2")); err != nil {
		return "", err
	}
	did, err := w.m2().Run(ctx, "meshd", "cleanup", "--all", "--force")
	if err != nil {
		return "", err
	}
	after, err := w.theirs(ctx)
	if err != nil {
		return "", err
	}
	if err := differ(before, after); err != nil {
		return "", err
	}
	left, err := w.m2().Run(ctx, "sh", "-c", "nft list tables | grep meshd; ip -o link | grep 'mesh0\\|msh'; ip route show table all proto 77; ip route show table all proto 78; find /etc/systemd /etc/NetworkManager -name '*meshd*'; true")
	if err == nil && strings.TrimSpace(left) != "" {
		err = fmt.Errorf("left:\n%s", left)
	}
	return fmt.Sprintf("%d traces removed", strings.Count(did, "\n")), err
}
