// Package upstream is the fence around the controllers of Kubernetes itself,
// run unmodified: every import of k8s.io/kubernetes/pkg/controller of the tree
// is here, so that the next minor version touches one folder, and any of them
// can be replaced by one of our own.
package upstream

import (
	"context"
	"errors"
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/scale"
	"k8s.io/client-go/util/flowcontrol"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/controller/cronjob"
	"k8s.io/kubernetes/pkg/controller/daemon"
	"k8s.io/kubernetes/pkg/controller/deployment"
	"k8s.io/kubernetes/pkg/controller/disruption"
	"k8s.io/kubernetes/pkg/controller/garbagecollector"
	"k8s.io/kubernetes/pkg/controller/job"
	"k8s.io/kubernetes/pkg/controller/replicaset"
	"k8s.io/kubernetes/pkg/controller/serviceaccount"
	"k8s.io/kubernetes/pkg/controller/statefulset"
)

// Where upstream's defaults are made for thousands of nodes and a busy API
// server, these are for tens of nodes and an API server in the same process.
const (
	workers = 4
	// burstReplicas bounds the pods one sync of a ReplicaSet creates at once.
	burstReplicas = 500
	// discoverPeriod is how often the garbage collector looks for new kinds.
	discoverPeriod = 30 * time.Second
	// graphTimeout is how long the garbage collector waits for its first view.
	graphTimeout = 30 * time.Second
)

// Config is what the controllers share.
type Config struct {
	// Client gives the configuration of an API client for one controller, so
	// that the API server and its log can tell them apart.
	Client func(name string) *rest.Config
	// Informers is the one shared set; the caller starts it when every
	// controller is built.
	Informers informers.SharedInformerFactory
	// Started is closed by the caller when Informers is running.
	Started <-chan struct{}
	// Serves says whether the API serves a resource. A controller whose
	// resources are not served is left out instead of waiting for ever.
	Serves func(schema.GroupVersionResource) bool
}

// Controller is one that is ready to run.
type Controller struct {
	Name string
	// Run returns when ctx ended and its workers are gone.
	Run func(ctx context.Context)
}

var (
	pods         = schema.GroupVersionResource{Version: "v1", Resource: "pods"}
	nodes        = schema.GroupVersionResource{Version: "v1", Resource: "nodes"}
	namespaces   = schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}
	services     = schema.GroupVersionResource{Version: "v1", Resource: "services"}
	accounts     = schema.GroupVersionResource{Version: "v1", Resource: "serviceaccounts"}
	claims       = schema.GroupVersionResource{Version: "v1", Resource: "persistentvolumeclaims"}
	replications = schema.GroupVersionResource{Version: "v1", Resource: "replicationcontrollers"}
	deployments  = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "deployments"}
	replicasets  = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "replicasets"}
	daemonsets   = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "daemonsets"}
	statefulsets = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "statefulsets"}
	revisions    = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "controllerrevisions"}
	jobs         = schema.GroupVersionResource{Group: "batch", Version: "v1", Resource: "jobs"}
	cronjobs     = schema.GroupVersionResource{Group: "batch", Version: "v1", Resource: "cronjobs"}
	slices       = schema.GroupVersionResource{Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"}
	budgets      = schema.GroupVersionResource{Group: "policy", Version: "v1", Resource: "poddisruptionbudgets"}
)

// builders in the order they start. The garbage collector is last: it makes
// informers for every kind nobody asked for before it.
var builders = []struct {
	name  string
	needs []schema.GroupVersionResource
	build func(context.Context, Config, *rest.Config, kubernetes.Interface) (func(context.Context), error)
}{
	{"deployment-controller", []schema.GroupVersionResource{deployments, replicasets, pods}, newDeployment},
	{"replicaset-controller", []schema.GroupVersionResource{replicasets, pods}, newReplicaSet},
	{"daemonset-controller", []schema.GroupVersionResource{daemonsets, revisions, pods, nodes}, newDaemonSet},
	{"statefulset-controller", []schema.GroupVersionResource{statefulsets, revisions, pods, claims}, newStatefulSet},
	{"job-controller", []schema.GroupVersionResource{jobs, pods}, newJob},
	{"cronjob-controller", []schema.GroupVersionResource{cronjobs, jobs}, newCronJob},
	{"serviceaccount-controller", []schema.GroupVersionResource{accounts, namespaces}, newServiceAccount},
	{"disruption-controller", []schema.GroupVersionResource{budgets, pods, replications, replicasets, deployments, statefulsets}, newDisruption},
	{"garbage-collector", nil, newGarbageCollector},
}

// New builds the controllers the API has the resources for, and names those
// it left out. ctx bounds the life of what they start while being built.
func New(ctx context.Context, cfg Config) (ready []Controller, left []string, err error) {
	for _, b := range builders {
		if !servesAll(cfg, b.needs) {
			left = append(left, b.name)
			continue
		}
		rc := cfg.Client(b.name)
		client, err := kubernetes.NewForConfig(rc)
		if err != nil {
			return nil, nil, fmt.Errorf("client of %s: %w", b.name, err)
		}
		named := klog.NewContext(ctx, klog.FromContext(ctx).WithName(b.name))
		run, err := b.build(named, cfg, rc, client)
		if err != nil {
			return nil, nil, fmt.Errorf("build %s: %w", b.name, err)
		}
		ready = append(ready, Controller{Name: b.name, Run: run})
	}
	return ready, left, nil
}

func servesAll(cfg Config, needs []schema.GroupVersionResource) bool {
	for _, r := range needs {
		if !cfg.Serves(r) {
			return false
		}
	}
	return true
}

func newDeployment(ctx context.Context, cfg Config, _ *rest.Config, client kubernetes.Interface) (func(context.Context), error) {
	apps := cfg.Informers.Apps().V1()
	c, err := deployment.NewDeploymentController(ctx, apps.Deployments(), apps.ReplicaSets(), cfg.Informers.Core().V1().Pods(), client)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) { c.Run(ctx, workers) }, nil
}

func newReplicaSet(ctx context.Context, cfg Config, _ *rest.Config, client kubernetes.Interface) (func(context.Context), error) {
	c := replicaset.NewReplicaSetController(ctx, cfg.Informers.Apps().V1().ReplicaSets(), cfg.Informers.Core().V1().Pods(), client, burstReplicas)
	return func(ctx context.Context) { c.Run(ctx, workers) }, nil
}

func newDaemonSet(ctx context.Context, cfg Config, _ *rest.Config, client kubernetes.Interface) (func(context.Context), error) {
	apps, core := cfg.Informers.Apps().V1(), cfg.Informers.Core().V1()
	backoff := flowcontrol.NewBackOff(time.Second, 15*time.Minute)
	c, err := daemon.NewDaemonSetsController(ctx, apps.DaemonSets(), apps.ControllerRevisions(), core.Pods(), core.Nodes(), client, backoff)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) { c.Run(ctx, workers) }, nil
}

func newStatefulSet(ctx context.Context, cfg Config, _ *rest.Config, client kubernetes.Interface) (func(context.Context), error) {
	apps, core := cfg.Informers.Apps().V1(), cfg.Informers.Core().V1()
	c := statefulset.NewStatefulSetController(ctx, core.Pods(), apps.StatefulSets(), core.PersistentVolumeClaims(), apps.ControllerRevisions(), client)
	return func(ctx context.Context) { c.Run(ctx, workers) }, nil
}

func newJob(ctx context.Context, cfg Config, _ *rest.Config, client kubernetes.Interface) (func(context.Context), error) {
	// The two nil informers belong to gang scheduling, an alpha gate that is off.
	c, err := job.NewController(ctx, client, cfg.Informers.Core().V1().Pods(), cfg.Informers.Batch().V1().Jobs(), nil, nil)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) { c.Run(ctx, workers) }, nil
}

func newCronJob(ctx context.Context, cfg Config, _ *rest.Config, client kubernetes.Interface) (func(context.Context), error) {
	batch := cfg.Informers.Batch().V1()
	c, err := cronjob.NewControllerV2(ctx, batch.Jobs(), batch.CronJobs(), client)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) { c.Run(ctx, workers) }, nil
}

func newServiceAccount(ctx context.Context, cfg Config, _ *rest.Config, client kubernetes.Interface) (func(context.Context), error) {
	core := cfg.Informers.Core().V1()
	c, err := serviceaccount.NewServiceAccountsController(klog.FromContext(ctx), core.ServiceAccounts(), core.Namespaces(), client, serviceaccount.DefaultServiceAccountsControllerOptions())
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) { c.Run(ctx, 1) }, nil
}

func newDisruption(ctx context.Context, cfg Config, rc *rest.Config, client kubernetes.Interface) (func(context.Context), error) {
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(client.Discovery()))
	scales, err := scale.NewForConfig(rc, mapper, dynamic.LegacyAPIPathResolverFunc, scale.NewDiscoveryScaleKindResolver(client.Discovery()))
	if err != nil {
		return nil, err
	}
	core, apps := cfg.Informers.Core().V1(), cfg.Informers.Apps().V1()
	c := disruption.NewDisruptionController(ctx, core.Pods(), cfg.Informers.Policy().V1().PodDisruptionBudgets(), core.ReplicationControllers(),
		apps.ReplicaSets(), apps.Deployments(), apps.StatefulSets(), client, mapper, scales, client.Discovery())
	return func(ctx context.Context) { c.Run(ctx, 1) }, nil
}

func newGarbageCollector(ctx context.Context, cfg Config, rc *rest.Config, client kubernetes.Interface) (func(context.Context), error) {
	meta, err := metadata.NewForConfig(rc)
	if err != nil {
		return nil, err
	}
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(client.Discovery()))
	graph := &graphInformers{
		typed:    cfg.Informers,
		metadata: metadatainformer.NewSharedInformerFactoryWithOptions(meta, 0, metadatainformer.WithTransform(trimMetadata)),
	}
	c, err := garbagecollector.NewGarbageCollector(ctx, client, meta, mapper, garbagecollector.DefaultIgnoredResources(), graph, cfg.Started)
	if err != nil {
		return nil, err
	}
	if c == nil {
		return nil, errors.New("no garbage collector")
	}
	return func(ctx context.Context) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.Sync(ctx, client.Discovery(), discoverPeriod)
		}()
		c.Run(ctx, workers, graphTimeout)
		<-done
		graph.metadata.Shutdown()
	}, nil
}
