package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	etcdkubernetes "go.etcd.io/etcd/client/v3/kubernetes"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/etcd3"
	"k8s.io/apiserver/pkg/storage/feature"
	"k8s.io/utils/clock"
)

const (
	// compactEvery is how long old revisions stay readable: slow watchers and
	// paged lists live on them.
	compactEvery = 5 * time.Minute
	// startTimeout bounds the wait for the embedded member to lead.
	startTimeout = time.Minute
	dialTimeout  = 10 * time.Second
)

// Store is an open etcd.
type Store struct {
	client    *etcdkubernetes.Client
	member    *embed.Etcd // nil: not ours
	compactor interface {
		etcd3.Compactor
		Stop()
	}
	closeOnce sync.Once
}

// Open starts a member of its own with its data below dir and waits until it
// answers. It listens on nothing.
func Open(ctx context.Context, dir string, log *slog.Logger) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open etcd: %w", err)
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open etcd: %w", err)
	}
	progressOnce.Do(supportProgress)
	member, err := embed.StartEtcd(memberConfig(dir, log))
	if err != nil {
		return nil, fmt.Errorf("open etcd in %s: %w", dir, err)
	}
	timeout := time.NewTimer(startTimeout)
	defer timeout.Stop()
	select {
	case <-member.Server.ReadyNotify():
	case <-member.Server.StopNotify():
		member.Close()
		return nil, fmt.Errorf("open etcd in %s: the member stopped while starting", dir)
	case <-timeout.C:
		member.Close()
		return nil, fmt.Errorf("open etcd in %s: no leader after %v", dir, startTimeout)
	case <-ctx.Done():
		member.Close()
		return nil, fmt.Errorf("open etcd in %s: %w", dir, ctx.Err())
	}
	return newStore(v3client.New(member.Server), member), nil
}

// Dial uses the etcd at endpoints. Nothing is asked of it before the first
// request or Probe.
func Dial(endpoints []string) (*Store, error) {
	client, err := clientv3.New(clientv3.Config{Endpoints: endpoints, DialTimeout: dialTimeout})
	if err != nil {
		return nil, fmt.Errorf("dial etcd %v: %w", endpoints, err)
	}
	return newStore(client, nil), nil
}

func newStore(client *clientv3.Client, member *embed.Etcd) *Store {
	client.KV = etcd3.NewETCDLatencyTracker(client.KV)
	c := &etcdkubernetes.Client{Client: client}
	c.Kubernetes = c
	return &Store{client: c, member: member, compactor: etcd3.NewCompactor(client, compactEvery, clock.RealClock{}, nil)}
}

// memberConfig is a member without any listener. Its URLs are names only.
func memberConfig(dir string, log *slog.Logger) *embed.Config {
	cfg := embed.NewConfig()
	cfg.Name = "meshd"
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.Dir = dir
	cfg.ListenPeerUrls, cfg.ListenClientUrls, cfg.ListenClientHttpUrls = nil, nil, nil
	// A member alone elects itself at the first timeout: a short one is a
	// quick start, and there is nobody it could be too short for.
	cfg.TickMs, cfg.ElectionMs = 50, 250
	cfg.EnableGRPCGateway = false
	// What a follower would need to catch up is memory here.
	cfg.SnapshotCount, cfg.SnapshotCatchUpEntries = 5000, 500
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zapTo(log))
	return cfg
}

// Probe answers nil when a linearizable read succeeds.
func (s *Store) Probe(ctx context.Context) error {
	_, err := s.client.KV.Get(ctx, "health", clientv3.WithKeysOnly())
	if err != nil {
		return fmt.Errorf("read from etcd: %w", err)
	}
	return nil
}

// Snapshot writes the whole database to path, atomically.
func (s *Store) Snapshot(path string) (err error) {
	if s.member == nil {
		return errors.New("snapshot etcd: not an embedded member")
	}
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("snapshot etcd: %w", err)
	}
	done := false
	defer func() {
		if !done {
			f.Close()
			os.Remove(tmp)
		}
	}()
	snap := s.member.Server.Backend().Snapshot()
	defer snap.Close()
	if _, err := snap.WriteTo(f); err != nil {
		return fmt.Errorf("snapshot etcd: %w", err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("snapshot etcd: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("snapshot etcd: %w", err)
	}
	done = true
	return nil
}

// Stopped is closed when the embedded member has died; it never is for an
// etcd that runs elsewhere.
func (s *Store) Stopped() <-chan struct{} {
	if s.member == nil {
		return nil
	}
	return s.member.Server.StopNotify()
}

// Close ends the client and the member. The data are on disk already.
func (s *Store) Close() {
	s.closeOnce.Do(func() {
		s.compactor.Stop()
		// An error here says only that the client's context is done.
		_ = s.client.Close()
		if s.member != nil {
			s.member.Close()
		}
	})
}

var progressOnce sync.Once

// supportProgress tells k8s.io/apiserver what the member inside this process
// can do. The stock checker asks each endpoint; there is none, and it would
// leave consistent reads from the cache and WatchList switched off.
func supportProgress() {
	feature.DefaultFeatureSupportChecker = inProcess{feature.NewDefaultFeatureSupportChecker()}
}

type inProcess struct{ feature.FeatureSupportChecker }

// Supports says yes to progress requests only: the in-process adapter has no
// range streams.
func (inProcess) Supports(f storage.Feature) bool { return f == storage.RequestWatchProgress }
