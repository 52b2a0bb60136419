BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0002');
CREATE TABLE base (
	id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	source TEXT NOT NULL, 
	layout TEXT NOT NULL, 
	fingerprint TEXT NOT NULL, 
	added_at TEXT NOT NULL, 
	CONSTRAINT pk_base PRIMARY KEY (id), 
	CONSTRAINT uq_base_name UNIQUE (name)
);
INSERT INTO "base" VALUES(1,'small','/models/small','sd1','ffffffff','2026-11-22T13:22:41.414389+00:00');
INSERT INTO "base" VALUES(2,'large','/models/large','sdxl','eeeeeeee','2026-11-22T13:22:41.457559+00:00');
CREATE TABLE concept (
	id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	kind TEXT NOT NULL, 
	definition TEXT NOT NULL, 
	added_at TEXT NOT NULL, 
	CONSTRAINT pk_concept PRIMARY KEY (id), 
	CONSTRAINT uq_concept_name UNIQUE (name)
);
INSERT INTO "concept" VALUES(1,'apple','object','{"anchor": "pear", "kind": "object", "name": "apple", "synonyms": []}','2026-11-22T13:22:41.431483+00:00');
INSERT INTO "concept" VALUES(2,'Äpfel & ''Birnen''','style','{"anchor": "\u4e00\u679a\u306e\u7d75", "kind": "style", "name": "\u00c4pfel & ''Birnen''", "synonyms": ["Pomologie", "fruit; still life"]}','2026-11-22T13:22:41.472465+00:00');
CREATE TABLE patch (
	id TEXT NOT NULL, 
	concept_id INTEGER NOT NULL, 
	base_id INTEGER NOT NULL, 
	solver TEXT NOT NULL, 
	kind TEXT NOT NULL, 
	settings TEXT NOT NULL, 
	seed BIGINT NOT NULL, 
	nbytes BIGINT NOT NULL, 
	blob TEXT NOT NULL, 
	seconds DOUBLE NOT NULL, 
	solved_at TEXT NOT NULL, 
	CONSTRAINT pk_patch PRIMARY KEY (id), 
	CONSTRAINT fk_patch_concept_id_concept FOREIGN KEY(concept_id) REFERENCES concept (id), 
	CONSTRAINT fk_patch_base_id_base FOREIGN KEY(base_id) REFERENCES base (id)
);
INSERT INTO "patch" VALUES('7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed',1,1,'uce','text map','{"lambda": 0.1}',7,3,'7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed',0.5,'2026-11-22T13:22:41.565911+00:00');
INSERT INTO "patch" VALUES('3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3',2,1,'uce','text map','{"lambda": 0.1}',7,3,'3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3',0.5,'2026-11-22T13:22:41.631499+00:00');
INSERT INTO "patch" VALUES('8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f',1,1,'uce','text map','{"lambda": 0.1}',7,5,'8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f',0.5,'2026-11-22T13:22:41.676707+00:00');
CREATE TABLE patch_tag (
	patch_id TEXT NOT NULL, 
	tag TEXT NOT NULL, 
	who TEXT NOT NULL, 
	at TEXT NOT NULL, 
	CONSTRAINT pk_patch_tag PRIMARY KEY (patch_id, tag), 
	CONSTRAINT fk_patch_tag_patch_id_patch FOREIGN KEY(patch_id) REFERENCES patch (id)
);
CREATE TABLE patch_text (
	id INTEGER NOT NULL, 
	patch_id TEXT NOT NULL, 
	text TEXT NOT NULL, 
	CONSTRAINT pk_patch_text PRIMARY KEY (id), 
	CONSTRAINT uq_patch_text_patch_id UNIQUE (patch_id), 
	CONSTRAINT fk_patch_text_patch_id_patch FOREIGN KEY(patch_id) REFERENCES patch (id)
);
INSERT INTO "patch_text" VALUES(1,'7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed','
apple
pear
object
text map
uce
small
object
uce
1
');
INSERT INTO "patch_text" VALUES(2,'3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3','
äpfel & ''birnen''
pomologie
fruit; still life
一枚の絵
style
text map
uce
small
style
uce
1
');
INSERT INTO "patch_text" VALUES(3,'8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f','
apple
pear
object
text map
uce
small
object
uce
1
');
CREATE TABLE "recipe" (
	id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	base_id INTEGER NOT NULL, 
	created_at TEXT NOT NULL, 
	revision INTEGER NOT NULL, 
	deleted_at TEXT, 
	CONSTRAINT pk_recipe PRIMARY KEY (id), 
	CONSTRAINT fk_recipe_base_id_base FOREIGN KEY(base_id) REFERENCES base (id)
);
INSERT INTO "recipe" VALUES(1,'safe',1,'2026-11-22T13:22:41.732824+00:00',5,NULL);
INSERT INTO "recipe" VALUES(2,'empty',2,'2026-11-22T13:22:41.793868+00:00',0,NULL);
CREATE TABLE recipe_patch (
	recipe_id INTEGER NOT NULL, 
	patch_id TEXT NOT NULL, 
	strength DOUBLE NOT NULL, until DATE, 
	CONSTRAINT pk_recipe_patch PRIMARY KEY (recipe_id, patch_id), 
	CONSTRAINT fk_recipe_patch_recipe_id_recipe FOREIGN KEY(recipe_id) REFERENCES recipe (id), 
	CONSTRAINT fk_recipe_patch_patch_id_patch FOREIGN KEY(patch_id) REFERENCES patch (id)
);
INSERT INTO "recipe_patch" VALUES(1,'3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3',0.5,NULL);
INSERT INTO "recipe_patch" VALUES(1,'8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f',1.0,NULL);
CREATE TABLE recipe_tag (
	recipe_id INTEGER NOT NULL, 
	tag TEXT NOT NULL, 
	revision INTEGER NOT NULL, 
	who TEXT NOT NULL, 
	at TEXT NOT NULL, 
	CONSTRAINT pk_recipe_tag PRIMARY KEY (recipe_id, tag), 
	CONSTRAINT fk_recipe_tag_recipe_id_recipe FOREIGN KEY(recipe_id) REFERENCES recipe (id)
);
CREATE TABLE recipe_text (
	id INTEGER NOT NULL, 
	recipe_id INTEGER NOT NULL, 
	revision INTEGER NOT NULL, 
	text TEXT NOT NULL, 
	CONSTRAINT pk_recipe_text PRIMARY KEY (id), 
	CONSTRAINT uq_recipe_text_recipe_id_revision UNIQUE (recipe_id, revision), 
	CONSTRAINT fk_recipe_text_recipe_id_recipe FOREIGN KEY(recipe_id) REFERENCES recipe (id)
);
INSERT INTO "recipe_text" VALUES(1,1,0,'
safe
small
');
INSERT INTO "recipe_text" VALUES(2,2,0,'
empty
large
');
INSERT INTO "recipe_text" VALUES(3,1,1,'
übung: one
in two lines
');
INSERT INTO "recipe_text" VALUES(4,1,2,'
übung: two
in two lines
');
INSERT INTO "recipe_text" VALUES(5,1,3,'
übung: one
in two lines
');
INSERT INTO "recipe_text" VALUES(6,1,4,'
übung: one
in two lines
');
INSERT INTO "recipe_text" VALUES(7,1,5,'
übung: three
in two lines
');
CREATE TABLE revision (
	id INTEGER NOT NULL, 
	recipe_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	action TEXT NOT NULL, 
	source TEXT, 
	why TEXT NOT NULL, 
	who TEXT NOT NULL, 
	at TEXT NOT NULL, 
	digest_before TEXT, 
	digest_after TEXT, 
	CONSTRAINT pk_revision PRIMARY KEY (id), 
	CONSTRAINT uq_revision_recipe_id_number UNIQUE (recipe_id, number), 
	CONSTRAINT ck_revision_action CHECK (action IN ('add', 'remove', 'strength', 'until', 'checkout', 'copy', 'delete', 'undelete')), 
	CONSTRAINT fk_revision_recipe_id_recipe FOREIGN KEY(recipe_id) REFERENCES recipe (id)
);
INSERT INTO "revision" VALUES(1,1,1,'add',NULL,'Übung: one
in two lines','tester','2026-11-22T13:22:41.863439+00:00',NULL,NULL);
INSERT INTO "revision" VALUES(2,1,2,'add',NULL,'Übung: two
in two lines','tester','2026-11-22T13:22:41.900303+00:00',NULL,NULL);
INSERT INTO "revision" VALUES(3,1,3,'strength',NULL,'Übung: one
in two lines','tester','2026-11-22T13:22:41.943730+00:00',NULL,NULL);
INSERT INTO "revision" VALUES(4,1,4,'remove',NULL,'Übung: one
in two lines','tester','2026-11-22T13:22:41.972930+00:00',NULL,NULL);
INSERT INTO "revision" VALUES(5,1,5,'add',NULL,'Übung: three
in two lines','tester','2026-11-22T13:22:42.016039+00:00',NULL,NULL);
CREATE TABLE revision_patch (
	revision_id INTEGER NOT NULL, 
	patch_id TEXT NOT NULL, 
	strength_before DOUBLE, 
	strength_after DOUBLE, 
	until_before DATE, 
	until_after DATE, 
	CONSTRAINT pk_revision_patch PRIMARY KEY (revision_id, patch_id), 
	CONSTRAINT fk_revision_patch_revision_id_revision FOREIGN KEY(revision_id) REFERENCES revision (id), 
	CONSTRAINT fk_revision_patch_patch_id_patch FOREIGN KEY(patch_id) REFERENCES patch (id)
);
INSERT INTO "revision_patch" VALUES(1,'7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed',NULL,1.0,NULL,NULL);
INSERT INTO "revision_patch" VALUES(2,'3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3',NULL,0.5,NULL,NULL);
INSERT INTO "revision_patch" VALUES(3,'7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed',1.0,2.0,NULL,NULL);
INSERT INTO "revision_patch" VALUES(4,'7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed',2.0,NULL,NULL,NULL);
INSERT INTO "revision_patch" VALUES(5,'8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f',NULL,1.0,NULL,NULL);
CREATE INDEX ix_recipe_patch_patch_id ON recipe_patch (patch_id);
CREATE UNIQUE INDEX uq_recipe_name ON recipe (name) WHERE deleted_at IS NULL;
CREATE INDEX ix_revision_patch_patch_id ON revision_patch (patch_id);
CREATE INDEX ix_recipe_patch_until ON recipe_patch (until);
CREATE INDEX ix_patch_tag_tag ON patch_tag (tag);
CREATE INDEX ix_recipe_tag_tag ON recipe_tag (tag);
CREATE INDEX ix_patch_solved_at_id ON patch (solved_at, id);
CREATE INDEX ix_patch_concept_id_solved_at_id ON patch (concept_id, solved_at, id);
CREATE INDEX ix_patch_base_id_solved_at_id ON patch (base_id, solved_at, id);
CREATE INDEX ix_patch_solver_solved_at_id ON patch (solver, solved_at, id);
COMMIT;
