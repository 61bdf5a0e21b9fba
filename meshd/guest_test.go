package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
	authorizationv1 "k8s.io/api/authorization/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/kubernetes/scheme"
	clienttesting "k8s.io/client-go/testing"

	"meshd.dev/pkg/status"
)

// The manifests grant what the agent asks for, and nothing besides.
func TestManifestsGrantTheRights(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "manifests", "base", "rbac.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var granted []string
	for doc := range strings.SplitSeq(string(b), "\n---\n") {
		obj, _, err := scheme.Codecs.UniversalDeserializer().Decode([]byte(doc), nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		role, ok := obj.(*rbacv1.ClusterRole)
		if !ok {
			continue
		}
		for _, rule := range role.Rules {
			for _, group := range rule.APIGroups {
				for _, resource := range rule.Resources {
					for _, verb := range rule.Verbs {
						name, sub, _ := strings.Cut(resource, "/")
						granted = append(granted, right{verb, group, name, sub}.String())
					}
				}
			}
		}
	}
	var wanted []string
	for _, r := range slices.Concat(rights, insights) {
		wanted = append(wanted, r.String())
	}
	slices.Sort(granted)
	slices.Sort(wanted)
	if diff := cmp.Diff(wanted, granted); diff != "" {
		t.Error(diff)
	}
}

func TestMissingRightsAreNamed(t *testing.T) {
	client := fake.NewClientset()
	client.PrependReactor("create", "selfsubjectaccessreviews", func(a clienttesting.Action) (bool, runtime.Object, error) {
		review := a.(clienttesting.CreateAction).GetObject().(*authorizationv1.SelfSubjectAccessReview)
		asked := review.Spec.ResourceAttributes
		review.Status.Allowed = asked.Subresource != "status" && asked.Group != "discovery.k8s.io"
		return true, review, nil
	})
	want := "these credentials may not: patch nodes/status, list endpointslices.discovery.k8s.io, watch endpointslices.discovery.k8s.io"
	if err := missingRights(context.Background(), client); err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	away := fake.NewClientset()
	away.PrependReactor("create", "*", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, errors.New("refused") })
	if err := missingRights(context.Background(), away); !errors.Is(err, errUnasked) {
		t.Errorf("an API that is away: %v", err)
	}
}

func TestForeignConfigurationIsNamed(t *testing.T) {
	for _, c := range []struct {
		name  string
		files []string
		want  string // part of the reason; empty: fine
	}{
		{"none", nil, ""},
		{"ours alone", []string{"10-meshd.conflist"}, ""},
		{"one behind ours", []string{"10-meshd.conflist", "87-podman.conflist"}, ""},
		{"one before ours", []string{"05-cilium.conflist", "10-meshd.conflist"}, "05-cilium.conflist comes before 10-meshd.conflist"},
		{"of the same number", []string{"10-flannel.conflist"}, "10-flannel.conflist comes before"},
		{"no configuration", []string{"00-README", "05-cilium.conflist.bak", "10-meshd.conflist"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			for _, f := range c.files {
				if err := os.WriteFile(filepath.Join(dir, f), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			n := &node{board: &status.Board{}}
			n.cfg.CNIConf = "10-meshd.conflist"
			if path := n.checkForeign(dir); (path == "") != (c.want == "") {
				t.Errorf("preferred: %q", path)
			}
			check := n.board.Checks()[0]
			if check.Healthy != (c.want == "") || !strings.Contains(check.Reason, c.want) {
				t.Errorf("%+v", check)
			}
			why := hindrances(n.board.Checks())
			if (len(why) > 0) != (c.want != "") {
				t.Errorf("hindrances %v", why)
			}
		})
	}
}

// One node's bad annotation must not make meshd unready on all the others.
func TestHindrancesAreThisMachines(t *testing.T) {
	checks := []status.Check{{Name: "kube/objects", Reason: "node m2: annotation"}, {Name: "tunnel/m2", Reason: "down"}, {Name: "dns/upstream", Reason: "away"},
		{Name: "datapath/firewall", Reason: "no nf_tables", Next: "load it"}, {Name: "cni/sweep", Healthy: true}, {Name: "kube/sync", Reason: "away", Next: "look"}}
	if got := hindrances(checks); !slices.Equal(got, []string{"kube/sync: away (look)", "datapath/firewall: no nf_tables (load it)"}) { // the cause first
		t.Errorf("%q", got)
	}
}

func TestAgentSettings(t *testing.T) {
	for _, c := range []struct {
		name string
		args []string
		want string // part of the error; empty: fine
	}{
		{"as it comes", nil, ""},
		{"a name with dots", []string{"--node-name", "ip-10-0-0-1.eu-west-1.compute.internal"}, ""},
		{"a bad name", []string{"--node-name", "M_1"}, "give the name of the Node object"},
		{"services", []string{"--services", "maybe"}, `--services "maybe": want on, off or auto`},
		{"cluster DNS off", []string{"--cluster-dns", "off"}, ""},
		{"cluster DNS by address", []string{"--cluster-dns", "10.96.0.10,fd00:10:96::a"}, ""},
		{"cluster DNS mixed", []string{"--cluster-dns", "auto,10.96.0.10"}, `--cluster-dns "auto": want addresses, auto or off`},
		{"a name for the configuration", []string{"--cni-conf-name", "05-other.conflist"}, "want a name that ends in -meshd.conflist"},
		{"a path for a name", []string{"--cni-conf-name", "a/05-meshd.conflist"}, "want a name that ends in"},
		{"no shortcut", []string{"--shortcut", "off"}, ""},
		{"a shortcut come what may", []string{"--shortcut", "on"}, `--shortcut "on": want auto or off`},
		{"a range", []string{"--pod-cidr", "10.244.0.1/16"}, "10.244.0.0/16 would be right"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var cfg agentConfig
			flags := pflag.NewFlagSet("agent", pflag.ContinueOnError)
			cfg.flags(flags)
			if err := flags.Parse(append([]string{"--node-name", "m1"}, c.args...)); err != nil {
				t.Fatal(err)
			}
			err := cfg.complete()
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}
