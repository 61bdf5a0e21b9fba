// Package node is this machine in the API: its Node object, which says what it
// is and how it is, and its Lease, which says that it lives.
package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	goruntime "runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"k8s.io/client-go/kubernetes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"meshd.dev/pkg/reconcile"
	"meshd.dev/pkg/status"
)

// Runtime is what the node asks its container runtime.
type Runtime interface {
	Version(context.Context) (string, error)
	Conditions(context.Context) ([]*cri.RuntimeCondition, error)
}

// Config of a Node.
type Config struct {
	Name    string
	Client  kubernetes.Interface
	Runtime Runtime
	IPs     []netip.Addr
	Labels  map[string]string
	// Port on which the agent serves.
	Port          string
	LeaseInterval time.Duration
	MaxPods       int
	// Ready, when set, is called when the node becomes ready.
	Ready func()
	// Dir is on the disk whose space counts.
	Dir   string
	Board *status.Board
	Log   *slog.Logger
}

// Node keeps the Node object and the Lease.
type Node struct {
	cfg  Config
	port int32
	loop *reconcile.Loop
	beat *reconcile.Loop

	mu      sync.Mutex
	version string
	pushed  time.Time
	uid     types.UID
	known   known
	lease   lease
	beating bool
	ready   bool
	removed time.Time // when the API last had no such node; zero when it has
	network string    // why pods cannot be connected
}

// The paces of looking at the node, and of saying again that nothing changed.
const (
	lookEvery = 5 * time.Second
	sayEvery  = 5 * time.Minute
	apiLimit  = 10 * time.Second
)

// New makes a Node; Run keeps it.
func New(cfg Config) (*Node, error) {
	port, err := strconv.ParseUint(cfg.Port, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("node %s: port %q: %w", cfg.Name, cfg.Port, err)
	}
	n := &Node{cfg: cfg, port: int32(port)}
	n.loop = reconcile.New(reconcile.Config{Name: "agent/node", Do: n.sync, Resync: lookEvery, MaxBackoff: 5 * time.Second,
		Report: func(err error) { n.report("agent/node", err) }, Log: cfg.Log})
	n.beat = reconcile.New(reconcile.Config{Name: "agent/lease", Do: n.renew, Resync: cfg.LeaseInterval, MaxBackoff: cfg.LeaseInterval,
		Report: n.beaten})
	return n, nil
}

// errRemoved: the cluster has no such node, and this one may not make it.
var errRemoved = errors.New("it was removed")

// report puts an outcome on the board, with what a person can do.
func (n *Node) report(name string, err error) {
	next := "check that the API server is reachable and the node's certificate valid"
	if n.wasRemoved() {
		err = n.removedError()
		next = "make a token on a server (meshctl token create) and start this machine with it: meshd join HOST --token TOKEN; its pods go on meanwhile"
	}
	n.cfg.Board.Report(name, err, next)
}

func (n *Node) removedError() error {
	return fmt.Errorf("node %s is not in the cluster: %w", n.cfg.Name, errRemoved)
}

func (n *Node) wasRemoved() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.removed.IsZero()
}

// beaten tells of the lease when that is news, not every second.
func (n *Node) beaten(err error) {
	n.report("agent/lease", err)
	n.mu.Lock()
	news := (err == nil) != n.beating
	n.beating = err == nil
	n.mu.Unlock()
	switch {
	case news && err == nil:
		n.cfg.Log.Info("lease is renewed", "node", n.cfg.Name, "every", n.cfg.LeaseInterval)
	case news:
		n.cfg.Log.Warn("retrying", "part", "agent/lease", "after", n.cfg.LeaseInterval, "err", err)
	}
}

// Run registers the node and keeps it current until ctx ends.
func (n *Node) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return n.loop.Run(ctx) })
	group.Go(func() error { return n.beat.Run(ctx) })
	group.Go(func() error { return n.watch(ctx) })
	return group.Wait()
}

// RuntimeVersion is the runtime's, as in containerd://1.6.20; empty until it
// answered once.
func (n *Node) RuntimeVersion() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.version
}

// NetworkProblem says why pods cannot be connected; empty when they can, or
// when the runtime has not said yet.
func (n *Node) NetworkProblem() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.network
}

// Allocatable is what pods may use.
func (n *Node) Allocatable() v1.ResourceList {
	_, allocatable := resources(n.cfg.Dir, n.cfg.MaxPods)
	return allocatable
}

// sync makes the Node object say what is so.
func (n *Node) sync(ctx context.Context) error {
	conditions, rtErr := n.conditions(ctx)
	n.noteReady(conditions)
	n.mu.Lock()
	later := time.Since(n.removed) < removedPace
	n.mu.Unlock()
	if later {
		return nil // the board tells of it
	}
	ctx, cancel := context.WithTimeout(ctx, apiLimit)
	defer cancel()
	old, err := n.object(ctx)
	n.noteRemoved(errors.Is(err, errRemoved))
	switch {
	case errors.Is(err, errRemoved):
		return nil
	case err != nil:
		return fmt.Errorf("node %s: %w", n.cfg.Name, err)
	}
	n.mu.Lock()
	n.uid = old.UID
	stale := time.Since(n.pushed) > sayEvery
	n.mu.Unlock()
	wanted := n.wanted(old, conditions, time.Now())
	if err := n.patch(ctx, old, wanted, stale); err != nil {
		return err
	}
	return rtErr
}

// notInCluster is in our API server's refusal of everything a node asks that
// has no Node object (pkg/apiserver/nodeauth); any other refusal may pass.
const notInCluster = "is not in the cluster"

// object is the node's own. Joining makes it; where the API lets the agent make
// it, the agent does so too.
func (n *Node) object(ctx context.Context) (obj *v1.Node, err error) {
	if obj = n.stillKnown(); obj != nil {
		return obj, nil
	}
	defer func() {
		if err == nil {
			n.know(obj, true)
		}
	}()
	nodes := n.cfg.Client.CoreV1().Nodes()
	obj, err = nodes.Get(ctx, n.cfg.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsForbidden(err) && strings.Contains(err.Error(), notInCluster):
		return nil, errRemoved
	case !apierrors.IsNotFound(err):
		return obj, err
	}
	obj, err = nodes.Create(ctx, &v1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.cfg.Name, Labels: n.labels()}}, metav1.CreateOptions{})
	switch {
	case apierrors.IsForbidden(err):
		return nil, errRemoved
	case apierrors.IsAlreadyExists(err):
		return nodes.Get(ctx, n.cfg.Name, metav1.GetOptions{})
	}
	return obj, err
}

// removedPace is the time between two questions whether a node that was removed
// is back.
const removedPace = 30 * time.Second

// noteRemoved tells once that the node was removed, and once that it is back.
// Pods are left alone: what becomes of them the API says.
func (n *Node) noteRemoved(removed bool) {
	n.mu.Lock()
	was := !n.removed.IsZero()
	n.removed = time.Time{}
	if removed {
		n.removed = time.Now()
	}
	n.mu.Unlock()
	switch {
	case removed && !was:
		n.cfg.Log.Error("node is not in the cluster: it was removed; pods go on running", "node", n.cfg.Name)
	case was && !removed:
		n.cfg.Log.Info("node is in the cluster again", "node", n.cfg.Name)
	}
}

// unreadyPace is the time between two looks while the node is not ready.
const unreadyPace = 500 * time.Millisecond

// noteReady looks again soon while the node is not ready, and tells when it
// becomes so.
func (n *Node) noteReady(conditions []v1.NodeCondition) {
	ready, network := false, ""
	for _, c := range conditions {
		switch {
		case c.Type == v1.NodeReady:
			ready = c.Status == v1.ConditionTrue
		case c.Type == v1.NodeNetworkUnavailable && c.Status == v1.ConditionTrue:
			network = c.Message
		}
	}
	n.mu.Lock()
	n.network = network
	news := ready && !n.ready
	n.ready = ready
	n.mu.Unlock()
	if !ready {
		time.AfterFunc(unreadyPace, n.loop.Kick)
	}
	if news && n.cfg.Ready != nil {
		n.cfg.Ready()
	}
}

func (n *Node) labels() map[string]string {
	labels := map[string]string{
		v1.LabelHostname: n.cfg.Name, v1.LabelOSStable: goruntime.GOOS, v1.LabelArchStable: goruntime.GOARCH,
	}
	for k, v := range n.cfg.Labels {
		labels[k] = v
	}
	return labels
}

// wanted is the object as it should be; what others write in it is kept.
func (n *Node) wanted(old *v1.Node, conditions []v1.NodeCondition, now time.Time) *v1.Node {
	w := old.DeepCopy()
	if w.Labels == nil {
		w.Labels = map[string]string{}
	}
	for k, v := range n.labels() {
		w.Labels[k] = v
	}
	w.Status.Capacity, w.Status.Allocatable = resources(n.cfg.Dir, n.cfg.MaxPods)
	w.Status.Addresses = nil
	for _, ip := range n.cfg.IPs {
		w.Status.Addresses = append(w.Status.Addresses, v1.NodeAddress{Type: v1.NodeInternalIP, Address: ip.String()})
	}
	w.Status.Addresses = append(w.Status.Addresses, v1.NodeAddress{Type: v1.NodeHostName, Address: n.cfg.Name})
	w.Status.DaemonEndpoints.KubeletEndpoint.Port = n.port
	w.Status.NodeInfo = nodeInfo(n.RuntimeVersion())
	for _, c := range conditions {
		setCondition(w, c, now)
	}
	return w
}

func setCondition(w *v1.Node, c v1.NodeCondition, now time.Time) {
	c.LastHeartbeatTime, c.LastTransitionTime = metav1.NewTime(now), metav1.NewTime(now)
	for i := range w.Status.Conditions {
		if w.Status.Conditions[i].Type != c.Type {
			continue
		}
		if w.Status.Conditions[i].Status == c.Status {
			c.LastTransitionTime = w.Status.Conditions[i].LastTransitionTime
		}
		w.Status.Conditions[i] = c
		return
	}
	w.Status.Conditions = append(w.Status.Conditions, c)
}

// patch writes what differs: labels on the object, the rest on its status. The
// heartbeat times alone are worth a write only when the last one is long ago.
func (n *Node) patch(ctx context.Context, old, wanted *v1.Node, stale bool) error {
	if !equality.Semantic.DeepEqual(old.Labels, wanted.Labels) {
		if err := n.send(ctx, old.DeepCopy(), withLabels(old, wanted.Labels)); err != nil {
			return err
		}
	}
	if !stale && equality.Semantic.DeepEqual(still(old), still(wanted)) {
		return nil
	}
	before, after := old.DeepCopy(), wanted.DeepCopy()
	after.ObjectMeta = before.ObjectMeta
	// Addresses merge by type and address in a patch; several of one type need
	// the whole list.
	if err := n.send(ctx, before, after, "status"); err != nil {
		return err
	}
	n.mu.Lock()
	n.pushed = time.Now()
	n.mu.Unlock()
	n.cfg.Log.Debug("node status written", "node", n.cfg.Name)
	return nil
}

func withLabels(old *v1.Node, labels map[string]string) *v1.Node {
	w := old.DeepCopy()
	w.Labels = labels
	return w
}

// still is the status without the times that always move.
func still(n *v1.Node) v1.NodeStatus {
	s := *n.Status.DeepCopy()
	for i := range s.Conditions {
		s.Conditions[i].LastHeartbeatTime = metav1.Time{}
	}
	return s
}

func (n *Node) send(ctx context.Context, before, after *v1.Node, subresource ...string) error {
	b, err := json.Marshal(before)
	if err != nil {
		return err
	}
	a, err := json.Marshal(after)
	if err != nil {
		return err
	}
	patch, err := strategicpatch.CreateTwoWayMergePatch(b, a, v1.Node{})
	if err != nil {
		return err
	}
	if len(subresource) > 0 && !equality.Semantic.DeepEqual(before.Status.Addresses, after.Status.Addresses) {
		if patch, err = replaceAddresses(patch, after.Status.Addresses); err != nil {
			return err
		}
	}
	now, err := n.cfg.Client.CoreV1().Nodes().Patch(ctx, n.cfg.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, subresource...)
	if err != nil {
		n.know(nil, false)
		return fmt.Errorf("write node %s: %w", n.cfg.Name, err)
	}
	n.know(now, false)
	return nil
}

// replaceAddresses has the patch replace the list of addresses whole: a merge
// goes by type, and a node of two address families has two of one type.
func replaceAddresses(patch []byte, addresses []v1.NodeAddress) ([]byte, error) {
	var p map[string]any
	if err := json.Unmarshal(patch, &p); err != nil {
		return nil, err
	}
	status, ok := p["status"].(map[string]any)
	if !ok {
		status = map[string]any{}
		p["status"] = status
	}
	list := []any{map[string]any{"$patch": "replace"}}
	for _, a := range addresses {
		list = append(list, a)
	}
	status["addresses"] = list
	delete(status, "$setElementOrder/addresses")
	return json.Marshal(p)
}

func readLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return firstLine(b)
}
