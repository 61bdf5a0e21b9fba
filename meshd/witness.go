package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"meshd.dev/pkg/durable"
	"meshd.dev/pkg/kube"
	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/reconcile"
	"meshd.dev/pkg/status"
)

// witness compares what the cluster says of this node with what there is, and
// tells it where people look: what meshd lacks in the log, in a file that the
// CNI plugin quotes, and in an event of each pod that waits for a network; pods
// of another network and policies that nobody enforces on the board and in an
// event of theirs.
type witness struct {
	node  *node
	local *kube.Local
	loop  *reconcile.Loop

	// Of the loop alone.
	logged           string
	foreign, waiting sightings
	said             map[types.UID]utterance
	warned           bool // of policies
}

// utterance is what was last said of an object, and when.
type utterance struct {
	text string
	at   time.Time
}

const (
	// witnessInterval is how soon what the board says is told elsewhere.
	witnessInterval = 5 * time.Second
	// lasting is how long something has to be so before it is told: between
	// the kernel, the records and the cluster's word some moments pass.
	lasting = 5 * time.Second
	// sayAgain is shorter than the hour for which a cluster keeps events.
	sayAgain = 50 * time.Minute
	// pause between two events about one object, whatever they say.
	pauseBetween = time.Minute
	// maxSaid bounds the events of one look.
	maxSaid = 20
)

func newWitness(n *node) *witness {
	w := &witness{node: n, foreign: sightings{}, waiting: sightings{}, said: map[types.UID]utterance{}}
	w.loop = reconcile.New(reconcile.Config{Name: "witness", Do: w.look, Settle: time.Second, Resync: witnessInterval, Log: n.log})
	w.local = kube.NewLocal(kube.LocalConfig{Client: n.api, Node: n.cfg.NodeName, Board: n.board, Log: n.log}, w.loop.Kick)
	return w
}

// look is one round. What cannot be told is told later.
func (w *witness) look(ctx context.Context) error {
	n, now := w.node, time.Now()
	other := n.checkForeign(n.confDir())
	checks := n.board.Checks()
	err := w.writeReason(hindrances(checks))
	why := hindrances(slices.DeleteFunc(checks, func(c status.Check) bool { return now.Sub(c.Since) < lasting }))
	w.log(why)
	var events []kube.Event
	if pods, known := w.local.Pods(); known {
		attached, attachedErr := n.attached()
		err = errors.Join(err, attachedErr)
		if attachedErr == nil {
			events = append(events, w.pods(pods, attachedTo(attached), other, why, now)...)
		}
		events = append(events, w.policies(pods)...)
	}
	sayErr := w.say(ctx, events, now)
	n.board.Report("kube/events", sayErr, "may these credentials create events? `kubectl apply -f manifests/base/rbac.yaml`")
	return err
}

// log of what hinders, when it becomes something else.
func (w *witness) log(why []string) {
	text := strings.Join(why, "; ")
	switch {
	case text == w.logged:
	case text == "":
		w.node.log.Info("nothing is in the way of this node's network any more")
	default:
		w.node.log.Warn("this node's network is not as it should be", "why", text)
	}
	w.logged = text
}

func (n *node) reasonFile() string { return filepath.Join(n.cfg.RunDir, "reason") }

// writeReason for the CNI plugin; an empty file says that nothing is wrong.
func (w *witness) writeReason(why []string) error {
	text := strings.Join(why, "; ")
	if text != "" {
		text += "\n"
	}
	if err := os.MkdirAll(w.node.cfg.RunDir, 0o700); err != nil {
		return err
	}
	_, err := durable.WriteFileIfChanged(w.node.reasonFile(), []byte(text), 0o644)
	return err
}

// pods names those that another network attached, and has an event for each,
// and for each that waits while something is wrong.
func (w *witness) pods(pods []kube.Pod, ours func(kube.Pod) bool, other string, why []string, now time.Time) (events []kube.Event) {
	foreign := w.foreign.lasting(pods, now, func(p kube.Pod) bool { return p.Running && !ours(p) })
	waiting := w.waiting.lasting(pods, now, func(p kube.Pod) bool { return p.Waiting })
	if len(foreign) == 0 {
		w.node.board.OK("kube/pods")
	} else {
		w.node.board.Fail("kube/pods", foreignPods(foreign), remedy(other)+"have each made anew: `kubectl delete pod`, or a restart of its owner")
	}
	for _, p := range foreign {
		events = append(events, kube.Event{About: p.Reference(), Reason: "NotAttachedByMeshd", Again: sayAgain, Message: fmt.Sprintf(
			"this pod has %s from another network, so meshd carries nothing between it and other nodes; %shave the pod made anew", addresses(p), remedy(other))})
	}
	if len(why) > 0 {
		for _, p := range waiting {
			events = append(events, kube.Event{About: p.Reference(), Reason: "MeshdIsNotUp", Again: sayAgain,
				Message: fmt.Sprintf("meshd on node %s: %s", w.node.cfg.NodeName, strings.Join(why, "; "))})
		}
	}
	return events
}

// remedy against a configuration that the container runtime prefers.
func remedy(other string) string {
	if other == "" {
		return ""
	}
	return fmt.Sprintf("switch that network off and remove %s on the node, then ", other)
}

// maxNamed bounds how many pods a line names.
const maxNamed = 5

func foreignPods(pods []kube.Pod) string {
	var names []string
	for _, p := range pods[:min(len(pods), maxNamed)] {
		names = append(names, fmt.Sprintf("%s/%s (%s)", p.Namespace, p.Name, addresses(p)))
	}
	if more := len(pods) - len(names); more > 0 {
		names = append(names, fmt.Sprintf("%d more", more))
	}
	return "attached by another network, so other nodes do not reach them: " + strings.Join(names, ", ")
}

func addresses(p kube.Pod) string {
	texts := make([]string, len(p.Addrs))
	for i, a := range p.Addrs {
		texts[i] = a.String()
	}
	return strings.Join(texts, ", ")
}

// attachedTo tells whether the plugin gave a pod one of its addresses.
func attachedTo(attached []mesh.LocalPod) func(kube.Pod) bool {
	given := map[netip.Addr]bool{}
	for _, p := range attached {
		for _, a := range p.Addrs {
			given[a] = true
		}
	}
	return func(p kube.Pod) bool {
		return slices.ContainsFunc(p.Addrs, func(a netip.Addr) bool { return given[a] })
	}
}

// sightings are since when pods were seen as something.
type sightings map[types.UID]time.Time

// lasting are the pods that have been so for long enough.
func (s sightings) lasting(pods []kube.Pod, now time.Time, so func(kube.Pod) bool) (long []kube.Pod) {
	seen := map[types.UID]bool{}
	for _, p := range pods {
		if !so(p) {
			continue
		}
		seen[p.UID] = true
		since, before := s[p.UID]
		if !before {
			s[p.UID] = now
		} else if now.Sub(since) >= lasting {
			long = append(long, p)
		}
	}
	for uid := range s {
		if !seen[uid] {
			delete(s, uid)
		}
	}
	return long
}

// say what was not said lately, each event with a try of its own.
func (w *witness) say(ctx context.Context, events []kube.Event, now time.Time) error {
	about := map[types.UID]bool{}
	var errs []error
	budget := maxSaid
	for _, e := range events {
		uid := e.About.UID
		about[uid] = true
		last, before := w.said[uid]
		same := before && last.text == e.Message
		if same && (e.Again == 0 || now.Sub(last.at) < e.Again) || before && now.Sub(last.at) < pauseBetween || budget == 0 {
			continue
		}
		budget--
		if err := kube.Say(ctx, w.node.api, w.node.cfg.NodeName, e); err != nil {
			errs = append(errs, err)
			continue
		}
		w.said[uid] = utterance{e.Message, now}
	}
	for uid, last := range w.said {
		if !about[uid] && now.Sub(last.at) >= pauseBetween {
			delete(w.said, uid)
		}
	}
	return errors.Join(errs...)
}
